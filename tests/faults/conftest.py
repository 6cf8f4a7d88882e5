"""What needs a compiler is not collected where there is none."""

import shutil

collect_ignore = [] if shutil.which("gcc") else ["test_faults.py"]
