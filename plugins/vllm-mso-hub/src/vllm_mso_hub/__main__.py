"""`python -m vllm_mso_hub shapes|generate JOB.json REPORT.json`: one job, one report.

Exit code 0 when a report was written, whatever it says; 2 for a call or a job that makes no sense. Everything else is
a crash: its traceback is on stderr, and then the error itself once more, as the last line.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from vllm_mso_hub.compat import prepare_environment
from vllm_mso_hub.job import Job, JobError


def main(argv: list[str]) -> int:
    """Run one job; the environment is set before vLLM is imported, which reads it once."""
    if len(argv) != 3 or argv[0] not in _VERBS:
        sys.stderr.write("usage: python -m vllm_mso_hub shapes|generate JOB.json REPORT.json\n")
        return 2
    verb, job, report = argv
    try:
        answer = _VERBS[verb](json.loads(Path(job).read_text()))
    except JobError as error:
        sys.stderr.write(f"vllm_mso_hub: {error}\n")
        return 2
    except Exception as error:  # noqa: BLE001 - told in full; what vLLM would say while it is torn down would bury it
        traceback.print_exc()
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    Path(report).write_text(json.dumps(answer))
    return 0


def _shapes(data: Any) -> dict[str, Any]:
    job = Job.from_dict(data)
    prepare_environment(gpu=False)
    from vllm_mso_hub.shapes import prove

    return prove(job).as_dict()


def _generate(data: Any) -> dict[str, Any]:
    from vllm_mso_hub.generate import run

    return dict(run(data))


_VERBS = {"shapes": _shapes, "generate": _generate}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
