#!/usr/bin/env bash
# See to it that there is a Chromium or Chrome for `make browser`.
#
#   MSO_CHROMIUM   program to take instead of the first one on PATH
#
# Nothing is installed where one is found. Else apt-get, as root or with a sudo that asks for no password.
set -euo pipefail

say() { echo "install_browser: $*" >&2; }

find_browser() {
    if [ -n "${MSO_CHROMIUM:-}" ]; then
        command -v "$MSO_CHROMIUM" && return
        say "MSO_CHROMIUM is $MSO_CHROMIUM, which cannot be run"
        exit 1
    fi
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" && return
    done
    return 1
}

find_browser && exit

as_root=()
if [ "$(id -u)" != 0 ]; then
    as_root=(sudo -n)
fi
if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
    say "no Chromium or Chrome on PATH, and no right to install one: install the package chromium or google-chrome," \
        "or set MSO_CHROMIUM to the program of 'playwright install chromium'"
    exit 1
fi
say "apt-get install chromium"
"${as_root[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
find_browser || { say "apt-get installed no chromium; install Google Chrome and set MSO_CHROMIUM"; exit 1; }
