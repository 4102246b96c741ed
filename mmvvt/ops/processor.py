"""What the operating system says about the processor."""

from pathlib import Path

CPUINFO = Path('/proc/cpuinfo')


def processor_field(*names: str) -> str:
    """Return a field of /proc/cpuinfo, for the first core.

    Args:
        *names (str): Names of the field, which depend on the architecture.

    Returns:
        str: Value of the first field with one of these names; empty if there
        is none, or on systems other than Linux.
    """
    try:
        lines = CPUINFO.read_text(encoding='utf-8').splitlines()
    except OSError:
        return ''
    for line in lines:
        name, _, value = line.partition(':')
        if name.strip() in names:
            return value.strip()
    return ''
