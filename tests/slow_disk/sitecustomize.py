"""Makes every fsync of a Python process take ASDA_TEST_FSYNC_S longer, so that a test can stop it inside a save.

Python imports a module of this name at its start when the folder is in PYTHONPATH.
"""

import os
import time

_fsync, _pause_s = os.fsync, float(os.environ.get("ASDA_TEST_FSYNC_S", "0"))


def _slow_fsync(descriptor: int) -> None:
    time.sleep(_pause_s)
    _fsync(descriptor)


os.fsync = _slow_fsync
