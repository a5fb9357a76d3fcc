"""What a user does without this tool: download a repo, or upload a folder, with huggingface_hub alone.

python -m tests.benchmarks.plain_client download dev/source FOLDER
python -m tests.benchmarks.plain_client upload dev/target FOLDER
"""

from __future__ import annotations

import sys

from huggingface_hub import HfApi


def main() -> None:
    """One transfer; HF_ENDPOINT and HF_TOKEN say where and as whom."""
    verb, repo, folder = sys.argv[1:]
    api = HfApi()
    if verb == "download":
        api.snapshot_download(repo, local_dir=folder)
    else:
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)


if __name__ == "__main__":
    main()
