"""docs/audit.md as a newcomer follows it: every ```bash block, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "audit.md"


def test_every_command_does_what_the_page_says(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    # The command of the source that is tested, under its installed name.
    (programs / "symbiosis").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m symbiosis "$@"\n', encoding="utf-8")
    (programs / "symbiosis").chmod(0o755)
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = os.environ | {"PATH": os.pathsep.join((str(programs), os.environ["PATH"]))}
    said = []
    for block in re.findall(r"^```bash\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        quick = block.replace("--budget 60", "--budget 5")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", quick],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        said.append(done.stdout + done.stderr)
    trained, attacked, reported, proved = said
    assert "the host reads every row" in " ".join(trained.split())
    assert "tokens.dictionary" in attacked
    assert "breached by the policy 'default'" in reported
    assert "9 rules kept; not checked: 10" in reported  # canaries were planted, and did not leave
    assert "reconciled" in proved
    assert "inclusion in" in proved
    assert (folder / "report" / "report.html").is_file()
