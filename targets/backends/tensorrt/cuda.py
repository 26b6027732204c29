"""The CUDA driver through ctypes: is there a GPU, and device memory for a session. No CUDA package is needed.

Function names are those of the driver's ABI (CUDA Driver API reference); ``_v2`` is what ``cuda.h`` maps the plain
names to.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

from compressor.errors import RunError
from compressor.types import Array

_SUCCESS = 0
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_Pointer = ctypes.c_uint64  # CUdeviceptr


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU that the driver sees. ``capability`` is 89 for compute capability 8.9."""

    index: int
    name: str
    capability: int


@dataclass(frozen=True)
class NoGpu:
    """Why nothing can be executed here."""

    reason: str


def load_driver() -> Any:
    """The driver library. OSError when there is none."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def probe_cuda(driver: Any = None) -> Gpu | NoGpu:
    """The first GPU, or the reason why there is none. Never raises.

    Enterprise TensorRT must not be touched before this found a GPU: its Runtime wraps a null pointer and the next
    call is SIGSEGV.
    """
    try:
        driver = driver or load_driver()
    except OSError as error:
        return NoGpu(f"no NVIDIA driver here ({error})")
    code = driver.cuInit(0)
    if code != _SUCCESS:
        return NoGpu(f"the NVIDIA driver does not start (CUDA error {code})")
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) != _SUCCESS or count.value < 1:
        return NoGpu("the NVIDIA driver sees no GPU")
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    codes = [
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device),
    ]
    if any(codes):
        return NoGpu(f"the NVIDIA driver does not describe its GPU (CUDA errors {codes})")
    return Gpu(0, name.value.decode("utf-8", "replace"), major.value * 10 + minor.value)


class DeviceMemory:
    """Primary context, one stream, and named buffers that grow.

    Use as a context manager; every call raises RunError on failure.
    """

    def __init__(self, gpu: Gpu, driver: Any = None) -> None:
        self._driver = driver or load_driver()
        self._device = ctypes.c_int()
        self._stream = ctypes.c_void_p()
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> address, bytes
        self._index = gpu.index

    def __enter__(self) -> DeviceMemory:
        context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), self._index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)
        return self

    def __exit__(self, *_: object) -> None:
        for address, _size in self._buffers.values():
            self._call("cuMemFree_v2", _Pointer(address))
        self._buffers.clear()
        self._call("cuStreamDestroy_v2", self._stream)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    @property
    def stream(self) -> int:
        """Handle of the stream, as TensorRT's ``execute_async_v3`` wants it."""
        return int(self._stream.value or 0)

    def reserve(self, name: str, size: int) -> int:
        """Address of a buffer of at least ``size`` bytes; kept between calls, so that steady use allocates nothing."""
        address, held = self._buffers.get(name, (0, 0))
        if held >= max(size, 1):
            return address
        if held:
            self._call("cuMemFree_v2", _Pointer(address))
            del self._buffers[name]
        fresh = _Pointer()
        self._call("cuMemAlloc_v2", ctypes.byref(fresh), ctypes.c_size_t(max(size, 1)))
        self._buffers[name] = (int(fresh.value), max(size, 1))
        return int(fresh.value)

    def upload(self, name: str, array: Array) -> int:
        """Copy a C-contiguous array to the device; its address there.

        Wait with :meth:`synchronize` before the array changes.
        """
        address = self.reserve(name, array.nbytes)
        source = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyHtoDAsync_v2", _Pointer(address), source, ctypes.c_size_t(array.nbytes), self._stream)
        return address

    def download(self, name: str, array: Array) -> None:
        """Copy the buffer ``name`` into a C-contiguous array; it is there after :meth:`synchronize`."""
        address, _held = self._buffers[name]
        target = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyDtoHAsync_v2", target, _Pointer(address), ctypes.c_size_t(array.nbytes), self._stream)

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self._stream)

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._driver, function)(*arguments)
        if code != _SUCCESS:
            raise RunError(
                f"CUDA driver: {function} failed with error {code}", hint="Look the code up in CUresult of cuda.h."
            )
