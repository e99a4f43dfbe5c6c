"""`python -m MODULE` whose embedded cluster starts before other tests, and forks its workers, where `preloaded()` of a
parent offers that.
"""

import os
import runpy
import sys
from functools import partialmethod

from ray._private.parameter import RayParams

from jobs.cluster import embedded
from tests.support.launch import ADDRESS
from tests.support.preloaded import LAUNCHER
from tests.support.priority import preferred

if ADDRESS in os.environ:
    RayParams.__init__ = partialmethod(RayParams.__init__, setup_worker_path=LAUNCHER)
embedded.start = preferred()(embedded.start)
sys.argv[:] = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
