"""python -m papers: list, show, run, check and promote papers. Answers at once; heavy modules are imported by commands.

python -m papers list
python -m papers run cegppo --scale smoke
"""

from __future__ import annotations

import sys

from papers._cli import main

if __name__ == "__main__":
    sys.exit(main())
