#!/usr/bin/env bash
# Run the tests with the newest releases of all dependencies, without the bounds of pyproject.toml.
#
#   scripts/try_newest.sh FOLDER [pytest arguments]      e.g. scripts/try_newest.sh /tmp/newest tests/test_compat.py
#
# FOLDER becomes a virtual environment. tests/test_compat.py names each broken use of a library's internals. All such
# uses are in bionemo_esm/compat.py, with the version from which they were read.
set -euo pipefail
folder=${1:?"name a folder for the virtual environment"}
shift
cd "$(dirname "$0")/.."
python3 -m venv "$folder"
"$folder/bin/python" - > "$folder/requirements.txt" << 'END'
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
    package, *marker = requirement.split(";")
    print(re.split(r"[<>=!~ ]", package, maxsplit=1)[0], *marker, sep=" ;" if marker else "")
END
"$folder/bin/pip" install --quiet --upgrade --requirement "$folder/requirements.txt"
"$folder/bin/pip" install --quiet --no-deps --editable .
"$folder/bin/pip" list 2> /dev/null | grep --ignore-case --extended-regexp '^(torch|lightning|megatron-core|nemo_toolkit|nemo-toolkit) '
"$folder/bin/python" -m pytest "${@:-tests}"
