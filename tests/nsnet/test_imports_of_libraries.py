"""Quick imports: open_clip without torch's compiler, which is there when something uses it."""

import gc
import subprocess
import sys

import pytest

from nsnet.imports import quick_imports


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_open_clip_comes_without_the_compiler_which_is_imported_when_used() -> None:
    """Costs 8 s of CPU in a process of its own."""
    assert (
        run(
            "import sys\n"
            "from nsnet import imports\n"
            "open_clip = imports.open_clip()\n"
            "print('torch._dynamo' in sys.modules, open_clip.__name__)\n"
            "import torch\n"
            "compiled = torch.compile(lambda x: x + 1, backend='eager')\n"
            "print(int(compiled(torch.zeros(()))), 'torch._dynamo.convert_frame' in sys.modules)"
        )
        == "False open_clip\n1 True"
    )


def test_library_that_uses_the_compiler_gets_it() -> None:
    assert (
        run(
            "import sys, torch\n"
            "from nsnet.imports import quick_imports\n"
            "with quick_imports():\n"
            "    print(torch.compiler.disable(len)([]), 'torch._dynamo.convert_frame' in sys.modules)\n"
            "    import torch._dynamo\n"
            "    print(torch._dynamo.is_compiling())\n"
            "print(sys.modules['torch._dynamo'].__file__ is not None, torch._dynamo.config.disable)"
        )
        == "0 False\nFalse\nTrue False"
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_of_garbage_is_as_before(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(ZeroDivisionError), quick_imports():
            assert not gc.isenabled()
            _ = 1 / 0
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if before else gc.disable()
