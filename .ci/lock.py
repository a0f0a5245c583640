"""Compile constraints.txt: one version for every package of the union of all extras. Run as `nox -s lock`.

pip resolves `.[every extra]` without installing, under the deliberate pins of [tool.assay.lock]. Resolved under the
oldest supported Python, so that every version exists for all of them. Local labels (+cpu) are dropped: the file says
which version, the machine decides which build.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# Versions that every session installs. Compiled by `nox -s lock` from the union of all extras; do not edit:
# deliberate pins and their reasons stand in pyproject.toml under [tool.assay.lock].
"""


def canonical(name: str) -> str:
    """Normalised distribution name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(extras: list[str], pins: list[str]) -> dict[str, str]:
    """Names and versions that pip would install into an empty environment; exits with pip's message if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "pins.txt"), Path(folder, "report.json")
        constraints.write_text("\n".join(pins) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "-c", str(constraints), f"{ROOT}[{','.join(extras)}]"]
        subprocess.run(command, check=True)
        installs = json.loads(report.read_text())["install"]
    return {canonical(item["metadata"]["name"]): item["metadata"]["version"].split("+")[0] for item in installs}


def main() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = tuple(map(int, re.findall(r">=3\.(\d+)", pyproject["project"]["requires-python"])))
    if sys.version_info[1:2] != oldest:
        sys.exit(f"Resolve under Python 3.{oldest[0]}, the oldest supported: install nox with it and run again.")
    pins = pyproject["tool"]["assay"]["lock"]["pins"]
    versions = resolve(sorted(pyproject["project"]["optional-dependencies"]), pins)
    versions.pop("assay")
    # A pin may concern a package that only another Python or platform needs.
    versions |= {canonical(name): version for name, version in (pin.split("==") for pin in pins)}
    (ROOT / "constraints.txt").write_text(HEADER + "".join(f"{n}=={v}\n" for n, v in sorted(versions.items())))
    print(f"constraints.txt: {len(versions)} packages")


if __name__ == "__main__":
    main()
