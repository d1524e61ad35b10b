import platform
import subprocess

import pytest

from src.models import kernel


@pytest.fixture
def compiled():
    """Skips where the C cannot be; where it can, what does not compile or is wrong is a failure."""
    if kernel.c_compiler() is None or platform.system() != "Linux":
        pytest.skip("needs Linux and a C compiler")
    assert kernel.library() is not None


@pytest.fixture
def products(compiled):
    """Skips where the CPU or its compiler does not multiply bfloat16."""
    flags = kernel._cpu().split()
    if "avx512_bf16" not in flags or "amx_bf16" in flags:
        pytest.skip("needs a CPU that multiplies bfloat16 by AVX-512, and not by AMX")
    command = [kernel.c_compiler(), "-mavx512bf16", "-E", "-x", "c", "/dev/null"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs a compiler that knows AVX512-BF16")
    assert kernel.multiplies_bfloat16()
