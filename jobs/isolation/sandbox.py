"""Confine a process before it parses untrusted files: no files, no network, no other processes, bounded memory.

A seccomp filter of the kernel allows only the system calls that computing needs. All others fail with "operation not
permitted": the process can open no file, not even for reading, create no socket and start no program. A compromised
decoder can only compute and write to pipes that are open already.
"""

import errno
import fcntl
import os
import resource
from typing import Final

ALLOWED_CALLS: Final = (
    "read write readv writev pread64 pwrite64 lseek close fstat newfstatat fstat64 poll ppoll pselect6 "
    "mmap mmap2 munmap mremap mprotect brk madvise futex futex_time64 "
    "clock_gettime clock_gettime64 clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage "
    "rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall exit exit_group "
    "getpid gettid getppid getuid geteuid getgid getegid getrandom uname sysinfo getcwd "
    "sched_yield sched_getaffinity set_robust_list rseq membarrier arch_prctl set_tid_address"
    .split()
)  # fmt: skip
"""System calls that computing, threads and open pipes need; `read` and its kin work on open descriptors only."""
CLONE_THREAD: Final = 0x00010000
FCNTL_COMMANDS: Final = (fcntl.F_GETFD, fcntl.F_GETFL)
"""Other commands let the kernel send any signal to any process of the same user (F_SETOWN, F_SETSIG)."""
MAX_DESCRIPTORS: Final = 16


def limit(memory_bytes: int) -> None:
    """Limit this process: `memory_bytes` of address space beyond its current size, no file output, no core dump."""
    with open("/proc/self/statm", "rb") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, used + memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, MAX_DESCRIPTORS),
    ):
        resource.setrlimit(kind, (most, most))


def confine() -> str | None:
    """Permit only `ALLOWED_CALLS`, irrevocably. Returns None, or the reason for failure: libseccomp is missing."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))  # load() sets no_new_privs
    for name in ALLOWED_CALLS:
        try:
            rules.add_rule(pyseccomp.ALLOW, name)
        except (ValueError, OSError):  # this architecture has no such call
            continue
    rules.add_rule(
        pyseccomp.ALLOW, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, CLONE_THREAD, CLONE_THREAD)
    )  # fmt: skip
    for command in FCNTL_COMMANDS:
        rules.add_rule(pyseccomp.ALLOW, "fcntl", pyseccomp.Arg(1, pyseccomp.EQ, command))
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")  # a filter cannot see its arguments; libraries use clone
    rules.add_rule(pyseccomp.ALLOW, "tgkill", pyseccomp.Arg(0, pyseccomp.EQ, os.getpid()))  # abort() needs it
    rules.add_rule(  # the process may read its own limits, not set them
        pyseccomp.ALLOW, "prlimit64", pyseccomp.Arg(0, pyseccomp.EQ, 0), pyseccomp.Arg(2, pyseccomp.EQ, 0)
    )
    rules.load()
    return None
