"""What libraries and the machine refuse, in a line that says what it is and the way out."""

import errno

_FULL = (errno.ENOSPC, errno.EDQUOT)


def explain(error: Exception, *, processes: int = 1) -> str | None:
    """Return what to tell of an error, without the stack trace that is only of use for a fault of this code.

    Args:
        error: whatever was raised.
        processes: of the job.

    Returns:
        A line, or the lines that this code raised; None where it may be a fault of this code.
    """
    if isinstance(error, MemoryError):
        said = f"; {error}" if str(error) else ""
        lower = "--config.batch_size, --config.data.processes or --config.data.threads"
        return f"the machine's memory is full: lower {lower}{said}"
    if isinstance(error, OSError) and error.strerror:
        return _of_files(error)
    if isinstance(error, ValueError | OSError | FloatingPointError | ImportError):
        return str(error)
    if type(error).__name__ == "JaxRuntimeError":  # `import jax` itself may have failed
        return _of_devices(str(error), processes)
    return None


def _of_files(error: OSError) -> str:
    named = f"{error.filename}: " if error.filename is not None else ""
    way_out = "; make room there, and run the same command again" if error.errno in _FULL else ""
    return f"{named}{error.strerror}{way_out}"


def _of_devices(message: str, processes: int) -> str:
    """Say what an error that JAX met on the devices may come of."""
    said = message.split("\n")[0]
    if "RESOURCE_EXHAUSTED" in message:
        return f"the devices' memory is full: lower --config.batch_size, or use more devices; {said}"
    if processes > 1:
        return (
            f"lost one of the {processes} processes; see what it says, and run the same command again; {said}"
        )
    return said
