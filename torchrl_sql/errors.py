"""What kind of error it is, told without importing torch."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of the machine or of a device."""
    # torch has a class for devices' memory; of the CPU's, and of page-locked memory, only its words tell.
    words = str(error) if isinstance(error, RuntimeError) else ""
    return (
        isinstance(error, MemoryError)
        or any(f"{kind.__module__}.{kind.__name__}" == "torch.OutOfMemoryError" for kind in type(error).__mro__)
        or any(each in words for each in ("DefaultCPUAllocator", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED"))
    )
