"""Device memory through the CUDA driver's ABI, and execution on a real GPU where there is one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from compressor.errors import RunError
from compressor.profile import HardwareProfile
from targets.backends.tensorrt import TensorRt
from targets.backends.tensorrt.cuda import DeviceMemory, Gpu, NoGpu, probe_cuda
from targets.base import Compiled

# Device memory in host memory, compiled against NVIDIA's own header: a wrong argument type would not link or would
# crash.
DRIVER = """
#include <cuda.h>
#include <stdlib.h>
#include <string.h>
_Static_assert(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == 75 && CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ==
76, ""); _Static_assert(CU_STREAM_NON_BLOCKING == 1 && sizeof(CUdeviceptr) == 8, ""); int live = 0; CUresult
cuInit(unsigned flags) { return CUDA_SUCCESS; } CUresult cuDeviceGetCount(int *count) { *count = 1; return
CUDA_SUCCESS; } CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 40 + ordinal; return CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int size, CUdevice device) { strncpy(name, "Test GPU", size); return
CUDA_SUCCESS; } CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute what, CUdevice device) {
  *value = what == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 8 : 9; return device == 40 ? CUDA_SUCCESS :
  CUDA_ERROR_INVALID_DEVICE; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)malloc(8); return
CUDA_SUCCESS; } CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return device == 40 ? CUDA_SUCCESS :
CUDA_ERROR_INVALID_DEVICE; } CUresult cuCtxSetCurrent(CUcontext context) { return context ? CUDA_SUCCESS :
CUDA_ERROR_INVALID_CONTEXT; } CUresult cuStreamCreate(CUstream *stream, unsigned flags) { *stream =
(CUstream)malloc(8); return CUDA_SUCCESS; } CUresult cuStreamDestroy(CUstream stream) { free(stream); return
CUDA_SUCCESS; } CUresult cuStreamSynchronize(CUstream stream) { return stream ? CUDA_SUCCESS :
CUDA_ERROR_INVALID_HANDLE; } CUresult cuMemAlloc(CUdeviceptr *address, size_t size) {
  if (size > (1ull << 40)) return CUDA_ERROR_OUT_OF_MEMORY;
  *address = (CUdeviceptr)malloc(size); live++; return CUDA_SUCCESS; }
CUresult cuMemFree(CUdeviceptr address) { free((void *)address); live--; return CUDA_SUCCESS; }
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
  memcpy((void *)to, from, size); return cuStreamSynchronize(stream); }
CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream stream) {
  memcpy(to, (void *)from, size); return cuStreamSynchronize(stream); }
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    headers = sorted(Path("/usr/local").glob("cuda*/include/cuda.h"))
    compiler = shutil.which("gcc")
    if compiler is None or not headers:
        pytest.skip("needs gcc and NVIDIA's cuda.h")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    command = [
        compiler,
        "-shared",
        "-fPIC",
        f"-I{headers[-1].parent}",
        "-o",
        str(folder / "driver.so"),
        str(folder / "driver.c"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(folder / "driver.so"))


def test_probe_reads_name_and_capability(driver: ctypes.CDLL) -> None:
    assert probe_cuda(driver) == Gpu(0, "Test GPU", 89)


def test_device_memory_round_trip_and_release(driver: ctypes.CDLL) -> None:
    live = ctypes.c_int.in_dll(driver, "live")
    sent = np.arange(12, dtype=np.float32).reshape(3, 4)
    got = np.zeros_like(sent)
    with DeviceMemory(Gpu(0, "Test GPU", 89), driver) as memory:
        assert memory.stream != 0
        first = memory.upload("x", sent)
        assert memory.reserve("x", 8) == first  # a smaller request keeps the buffer
        memory.download("x", got)
        memory.synchronize()
        memory.reserve("x", 4096)
        assert live.value == 1
        with pytest.raises(RunError, match="cuMemAlloc_v2 failed with error 2"):
            memory.reserve("huge", 1 << 41)
    np.testing.assert_array_equal(got, sent)
    assert live.value == 0


def gpu_of(make_profile: Callable[..., HardwareProfile]) -> HardwareProfile:
    gpu = probe_cuda()
    if isinstance(gpu, NoGpu):
        pytest.skip(gpu.reason)
    return make_profile(f"{gpu.capability // 10}.{gpu.capability % 10}", max_batch=8)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "cosine"), [("fp32", 0.9999), ("weighted-only", 0.99)])
def test_engine_agrees_with_onnxruntime(
    name: str,
    cosine: float,
    rtx: str,
    engines: Mapping[str, Compiled],
    make_profile: Callable[..., HardwareProfile],
    tmp_path: Path,
) -> None:
    profile = gpu_of(make_profile)
    backend = TensorRt()
    compiled = backend.compile(engines[name].artifact, profile, tmp_path)
    sample = np.random.default_rng(2).standard_normal((4, 3, 32, 32)).astype(np.float32)
    reference = onnxruntime.InferenceSession(str(compiled.artifact.path), providers=["CPUExecutionProvider"])
    wanted = reference.run(None, {"x": sample})[0].ravel()
    with backend.open(compiled, profile) as session:
        got = session.run({"x": sample})["logits"].ravel()
        with pytest.raises(RunError, match="outside the optimisation profile"):
            session.run({"x": np.repeat(sample, 4, axis=0)})
        with pytest.raises(RunError, match="is missing"):
            session.run({})
    assert float(got @ wanted / np.linalg.norm(got) / np.linalg.norm(wanted)) > cosine
