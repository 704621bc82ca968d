# cython: language_level=3, boundscheck=False, wraparound=False
"""Adds to pyfuse3 what libfuse 3 and the kernel can do beyond it: operations, flags, inode numbers.

fuse.py loads this module with RTLD_GLOBAL before pyfuse3, so pyfuse3 calls the `fuse_session_new`
and `fuse_session_mount` defined here. They complete the table of operations, then call libfuse's
functions. `fuse_session_custom_io` puts this module between libfuse and /dev/fuse, where it

- turns TMPFILE requests, which are newer than libfuse 3.14, into CREATE: the layout is the same,
  and the name is "/", which no file can have;
- turns STATX requests (Linux 6.6) into GETATTR, which begin alike, and writes their answer itself,
  with the birth time;
- reads and adds the flags of INIT and its answer that this libfuse does not know;
- keeps flags of each WRITE and SETATTR request until the next one, for the handler that runs in
  between.

pyfuse3 has one number for a file, its node id. Programs see another one (st_ino, d_ino): the
functions `fuse_reply_attr` and so on defined here put it into the answers, then call libfuse's
functions.

Operations added here are answered before they return, so the installed methods must not wait. They
return the result or a negative errno, and raise nothing. Nothing here allocates memory.
Source of the layouts: linux/fuse.h and libfuse's fuse_lowlevel.h.
"""

from libc.errno cimport EIO
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset


cdef extern from "<dlfcn.h>" nogil:
    void *dlsym(void *, const char *)
    void *RTLD_NEXT


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t sys_writev "writev" (int, iovec *, int)


cdef extern from "<unistd.h>" nogil:
    ssize_t sys_read "read" (int, void *, size_t)


cdef extern from "<linux/fuse.h>" nogil:
    enum:
        FUSE_GETATTR
        FUSE_SETATTR
        FUSE_INIT
        FUSE_CREATE
        FUSE_WRITE
        FUSE_WRITE_KILL_SUIDGID
        FUSE_HANDLE_KILLPRIV_V2
    struct fuse_in_header:
        uint32_t opcode
        uint64_t unique
    struct fuse_out_header:
        int32_t error
        uint64_t unique
    struct fuse_init_in:
        uint32_t flags
    struct fuse_init_out:
        uint32_t flags
    struct fuse_getattr_in:
        uint32_t getattr_flags
    struct fuse_setattr_in:
        uint32_t valid
    struct fuse_write_in:
        uint32_t write_flags


cdef extern from "<time.h>" nogil:
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec


cdef extern from "<sys/sysmacros.h>" nogil:
    unsigned major(uint64_t)
    unsigned minor(uint64_t)


cdef extern from "<sys/stat.h>" nogil:
    struct stat:
        uint64_t st_ino
        uint32_t st_mode
        uint32_t st_nlink
        uint32_t st_uid
        uint32_t st_gid
        uint64_t st_rdev
        uint64_t st_size
        uint32_t st_blksize
        uint64_t st_blocks
        timespec st_atim
        timespec st_mtim
        timespec st_ctim


cdef extern from "<fuse_lowlevel.h>" nogil:
    ctypedef uint64_t fuse_ino_t
    ctypedef int64_t off_t
    ctypedef struct fuse_req
    ctypedef fuse_req *fuse_req_t
    struct fuse_args
    struct fuse_session
    struct fuse_file_info:
        uint64_t fh
    struct fuse_entry_param:
        fuse_ino_t ino
        stat attr
    struct fuse_conn_info:
        unsigned capable
        unsigned want
        unsigned max_background
        unsigned congestion_threshold
    struct fuse_lowlevel_ops:
        void (*init)(void *, fuse_conn_info *) noexcept
        void (*fallocate)(
            fuse_req_t, fuse_ino_t, int, off_t, off_t, fuse_file_info *) noexcept
        void (*lseek)(fuse_req_t, fuse_ino_t, off_t, int, fuse_file_info *) noexcept
        void (*copy_file_range)(
            fuse_req_t, fuse_ino_t, off_t, fuse_file_info *,
            fuse_ino_t, off_t, fuse_file_info *, size_t, int) noexcept
    struct fuse_custom_io:
        ssize_t (*writev)(int, iovec *, int, void *) noexcept
        ssize_t (*read)(int, void *, size_t, void *) noexcept
    int fuse_reply_buf(fuse_req_t, const char *, size_t)
    int fuse_reply_err(fuse_req_t, int)
    int fuse_reply_lseek(fuse_req_t, off_t)
    int fuse_reply_write(fuse_req_t, size_t)
    int fuse_session_custom_io(fuse_session *, const fuse_custom_io *, int)
    int fuse_session_fd(fuse_session *)
    unsigned FUSE_CAP_ASYNC_DIO
    unsigned FUSE_CAP_DONT_MASK
    unsigned FUSE_CAP_CACHE_SYMLINKS
    unsigned FUSE_CAP_PARALLEL_DIROPS


cdef enum:
    TMPFILE = 51  # FUSE_TMPFILE of Linux 6.2; headers may be older than the kernel
    STATX = 52  # FUSE_STATX of Linux 6.6
    STATX_BASIC_STATS = 0x7FF
    STATX_BTIME = 0x800
    BILLION = 1_000_000_000
    INIT_BYTES = 16  # of the INIT request and of its answer, `flags` included


# From linux/fuse.h of Linux 6.6; the installed headers may be older than the kernel.
cdef struct sx_time:
    int64_t tv_sec
    uint32_t tv_nsec
    int32_t reserved


cdef struct statx_out:
    uint64_t attr_valid
    uint32_t attr_valid_nsec
    uint32_t flags
    uint64_t spare[2]
    # struct fuse_statx, 256 bytes
    uint32_t mask
    uint32_t blksize
    uint64_t attributes
    uint32_t nlink
    uint32_t uid
    uint32_t gid
    uint16_t mode
    uint16_t spare_mode
    uint64_t ino
    uint64_t size
    uint64_t blocks
    uint64_t attributes_mask
    sx_time atime
    sx_time btime
    sx_time ctime
    sx_time mtime
    uint32_t rdev_major
    uint32_t rdev_minor
    uint32_t dev_major
    uint32_t dev_minor
    uint64_t spare_end[14]


assert sizeof(statx_out) == 32 + 256

VERSION = 4  # compared by fuse.py: increase it with every change of a function's signature

ctypedef fuse_session *(*session_new_t)(
    fuse_args *, const fuse_lowlevel_ops *, size_t, void *) noexcept
ctypedef int (*session_mount_t)(fuse_session *, const char *) noexcept
ctypedef int (*reply_attr_t)(fuse_req_t, const stat *, double) noexcept nogil
ctypedef int (*reply_entry_t)(fuse_req_t, const fuse_entry_param *) noexcept nogil
ctypedef int (*reply_create_t)(
    fuse_req_t, const fuse_entry_param *, const fuse_file_info *) noexcept nogil
ctypedef size_t (*add_direntry_plus_t)(
    fuse_req_t, char *, size_t, const char *, const fuse_entry_param *, off_t) noexcept nogil

cdef object _operations = None
cdef fuse_lowlevel_ops _table
cdef fuse_custom_io _io
cdef void (*_next_init)(void *, fuse_conn_info *) noexcept
cdef unsigned _background = 0
cdef bint _wants_cached_symlinks = False
cdef bint _wants_dont_mask = False
cdef bint _wants_killpriv = False
cdef uint64_t _init_unique = 0
cdef uint32_t _kernel_flags = 0
cdef bint _write_kills = False
cdef bint _is_statx = False
cdef uint32_t _setattr_valid = 0
cdef bint _has_killpriv = False
cdef bint _has_dont_mask = False
cdef uint64_t _plain_base = 0
cdef uint64_t _plain_mask = 0
cdef fuse_ino_t _odd_node = 0
cdef uint64_t _odd_number = 0
cdef reply_attr_t _reply_attr
cdef reply_entry_t _reply_entry
cdef reply_create_t _reply_create
cdef add_direntry_plus_t _add_direntry_plus


def install(
    operations, *, unsigned background, bint cache_symlinks, bint dont_mask, bint killpriv
):
    """Set which operations the next session adds. Call it before `pyfuse3.init`.

    Args:
        operations: has the methods `fallocate(node, mode, offset, length)`,
            `lseek(node, offset, whence)` and
            `copy_file_range(node_in, offset_in, node_out, offset_out, length)`. Each returns an int
            that is not negative, or a negative errno. It also has `birth_ns(node)`, which returns
            nanoseconds, or None if the node has no birth time.
        background: limit of requests in flight for read-ahead and direct I/O.
        cache_symlinks: let the kernel cache the targets of symlinks. Reads of cached ones are not
            seen. dont_mask: request FUSE_DONT_MASK: the filesystem applies the umask, because it
            knows the default
            ACLs.
        killpriv: request FUSE_HANDLE_KILLPRIV_V2: the filesystem clears set-id bits, and the kernel
            does not ask for `security.capability` before every write.
    """
    global _operations, _background, _wants_cached_symlinks, _wants_dont_mask, _wants_killpriv
    _operations = operations
    _background = background
    _wants_cached_symlinks = cache_symlinks
    _wants_dont_mask = dont_mask
    _wants_killpriv = killpriv


def set_numbers(
    *, uint64_t plain_base, uint64_t plain_mask, uint64_t odd_node, uint64_t odd_number
):
    """Set which inode numbers programs see: the node id, with two exceptions.

    Args:
        plain_base, plain_mask: if a node id equals `plain_base` outside the bits of the mask,
            programs see only those bits.
        odd_node, odd_number: for this node programs see that number.
    """
    global _plain_base, _plain_mask, _odd_node, _odd_number
    _plain_base, _plain_mask = plain_base, plain_mask
    _odd_node, _odd_number = odd_node, odd_number


def has_dont_mask():
    """Whether the filesystem must apply the umask; known after INIT."""
    return _has_dont_mask


def has_killpriv():
    """Whether the filesystem must clear set-id bits and capabilities; known after INIT."""
    return _has_killpriv


def write_kills_privileges():
    """Whether the last WRITE request has the flag to clear set-id bits."""
    return _write_kills


def setattr_valid():
    """The flags (FATTR_*) of the last SETATTR request."""
    return _setattr_valid


# --- operations -----------------------------------------------------------------------------------


cdef int64_t _as_int(object result) noexcept:
    """Convert to int; a non-number is our bug: -EIO."""
    cdef int64_t number
    try:
        number = result
    except Exception:
        return -EIO
    return number


cdef void _on_fallocate(
    fuse_req_t req, fuse_ino_t node, int mode, off_t offset, off_t length, fuse_file_info *info
) noexcept with gil:
    cdef int64_t answer
    try:
        answer = _as_int(_operations.fallocate(node, mode, offset, length))
    except BaseException:
        answer = -EIO
    fuse_reply_err(req, <int>-answer if answer < 0 else 0)


cdef void _on_lseek(
    fuse_req_t req, fuse_ino_t node, off_t offset, int whence, fuse_file_info *info
) noexcept with gil:
    cdef int64_t answer
    try:
        answer = _as_int(_operations.lseek(node, offset, whence))
    except BaseException:
        answer = -EIO
    if answer < 0:
        fuse_reply_err(req, <int>-answer)
    else:
        fuse_reply_lseek(req, answer)


cdef void _on_copy_file_range(
    fuse_req_t req, fuse_ino_t node_in, off_t offset_in, fuse_file_info *info_in,
    fuse_ino_t node_out, off_t offset_out, fuse_file_info *info_out, size_t length, int flags
) noexcept with gil:
    cdef int64_t answer
    try:
        answer = _as_int(
            _operations.copy_file_range(node_in, offset_in, node_out, offset_out, length)
        )
    except BaseException:
        answer = -EIO
    if answer < 0:
        fuse_reply_err(req, <int>-answer)
    else:
        fuse_reply_write(req, <size_t>answer)


# --- inode numbers --------------------------------------------------------------------------------


cdef uint64_t _number(fuse_ino_t node) noexcept nogil:
    """The inode number that programs see for a node."""
    if node & ~_plain_mask == _plain_base:
        return node & _plain_mask
    return _odd_number if node == _odd_node else node


cdef fuse_entry_param _numbered(const fuse_entry_param *entry) noexcept nogil:
    cdef fuse_entry_param answer = entry[0]
    answer.attr.st_ino = _number(entry.ino)
    return answer


cdef bint _find_replies() noexcept:
    """Find libfuse's functions, which those of this module hide. Returns whether all were found."""
    global _reply_attr, _reply_entry, _reply_create, _add_direntry_plus
    _reply_attr = <reply_attr_t>dlsym(RTLD_NEXT, "fuse_reply_attr")
    _reply_entry = <reply_entry_t>dlsym(RTLD_NEXT, "fuse_reply_entry")
    _reply_create = <reply_create_t>dlsym(RTLD_NEXT, "fuse_reply_create")
    _add_direntry_plus = <add_direntry_plus_t>dlsym(RTLD_NEXT, "fuse_add_direntry_plus")
    return (
        _reply_attr != NULL
        and _reply_entry != NULL
        and _reply_create != NULL
        and _add_direntry_plus != NULL
    )


cdef public int fuse_reply_attr(
    fuse_req_t req, const stat *attributes, double timeout
) noexcept nogil:
    """Hides libfuse's function: `st_ino` comes in as the node id. Also answers STATX."""
    global _is_statx
    cdef stat answer = attributes[0]
    answer.st_ino = _number(attributes.st_ino)
    if _is_statx:
        _is_statx = False
        return _reply_statx(req, attributes.st_ino, &answer, timeout)
    return _reply_attr(req, &answer, timeout)


cdef int _reply_statx(
    fuse_req_t req, fuse_ino_t node, const stat *attributes, double timeout
) noexcept nogil:
    cdef statx_out answer
    cdef int64_t birth_ns = 0
    cdef bint is_known
    with gil:
        is_known = _birth_ns(node, &birth_ns)
    memset(&answer, 0, sizeof(answer))
    answer.attr_valid = <uint64_t>timeout
    answer.attr_valid_nsec = <uint32_t>((timeout - <double>answer.attr_valid) * 1e9)
    answer.mask = STATX_BASIC_STATS
    answer.blksize = attributes.st_blksize
    answer.nlink = attributes.st_nlink
    answer.uid = attributes.st_uid
    answer.gid = attributes.st_gid
    answer.mode = attributes.st_mode
    answer.ino = attributes.st_ino
    answer.size = attributes.st_size
    answer.blocks = attributes.st_blocks
    answer.rdev_major = major(attributes.st_rdev)
    answer.rdev_minor = minor(attributes.st_rdev)
    _set_time(&answer.atime, &attributes.st_atim)
    _set_time(&answer.mtime, &attributes.st_mtim)
    _set_time(&answer.ctime, &attributes.st_ctim)
    if is_known:
        answer.mask |= STATX_BTIME
        # `//` and `%` round down as in Python, which is right also before 1970.
        answer.btime.tv_sec = birth_ns // BILLION
        answer.btime.tv_nsec = <uint32_t>(birth_ns % BILLION)
    return fuse_reply_buf(req, <const char *>&answer, sizeof(answer))


cdef void _set_time(sx_time *target, const timespec *source) noexcept nogil:
    target.tv_sec = source.tv_sec
    target.tv_nsec = <uint32_t>source.tv_nsec


cdef bint _birth_ns(fuse_ino_t node, int64_t *birth_ns) noexcept:
    """Store the birth time of a node at `birth_ns`. Returns whether it is known."""
    try:
        found = _operations.birth_ns(node)
        if found is None:
            return False
        birth_ns[0] = found
    except Exception:
        return False
    return True


cdef public int fuse_reply_entry(fuse_req_t req, const fuse_entry_param *entry) noexcept nogil:
    """Hides libfuse's function: sets the inode number that programs see, then calls it."""
    cdef fuse_entry_param answer = _numbered(entry)
    return _reply_entry(req, &answer)


cdef public int fuse_reply_create(
    fuse_req_t req, const fuse_entry_param *entry, const fuse_file_info *info
) noexcept nogil:
    """Hides libfuse's function: sets the inode number that programs see, then calls it."""
    cdef fuse_entry_param answer = _numbered(entry)
    return _reply_create(req, &answer, info)


cdef public size_t fuse_add_direntry_plus(
    fuse_req_t req, char *buffer, size_t size, const char *name,
    const fuse_entry_param *entry, off_t cookie,
) noexcept nogil:
    """Hides libfuse's function: sets the inode number that programs see, then calls it."""
    cdef fuse_entry_param answer = _numbered(entry)
    return _add_direntry_plus(req, buffer, size, name, &answer, cookie)


# --- the connection -------------------------------------------------------------------------------


cdef void _on_init(void *data, fuse_conn_info *connection) noexcept with gil:
    global _has_dont_mask
    _next_init(data, connection)
    if _background:
        connection.max_background = _background
        connection.congestion_threshold = _background * 3 // 4
    # libfuse requests this. With it, many kernels keep stale pages in the cache: they drop the
    # pages that were read during a direct write when the call returns, but then the write is still
    # in flight.
    connection.want &= ~FUSE_CAP_ASYNC_DIO
    connection.want |= connection.capable & FUSE_CAP_PARALLEL_DIROPS
    if _wants_cached_symlinks:
        connection.want |= connection.capable & FUSE_CAP_CACHE_SYMLINKS
    if _wants_dont_mask:
        connection.want |= connection.capable & FUSE_CAP_DONT_MASK
    _has_dont_mask = connection.want & FUSE_CAP_DONT_MASK != 0


cdef ssize_t _on_read(int fd, void *buffer, size_t size, void *data) noexcept nogil:
    """read(2) of one request. Looks at it and changes it as the docstring of the module says."""
    global _init_unique, _is_statx, _kernel_flags, _setattr_valid, _write_kills
    cdef fuse_in_header *header = <fuse_in_header *>buffer
    cdef void *body = <char *>buffer + sizeof(fuse_in_header)
    cdef ssize_t count = sys_read(fd, buffer, size)
    if count < <ssize_t>sizeof(fuse_in_header):
        return count
    _is_statx = False
    if header.opcode == FUSE_WRITE:
        if count >= <ssize_t>(sizeof(fuse_in_header) + sizeof(fuse_write_in)):
            _write_kills = (<fuse_write_in *>body).write_flags & FUSE_WRITE_KILL_SUIDGID != 0
    elif header.opcode == FUSE_SETATTR:
        if count >= <ssize_t>(sizeof(fuse_in_header) + sizeof(fuse_setattr_in)):
            _setattr_valid = (<fuse_setattr_in *>body).valid
    elif header.opcode == STATX:
        if count >= <ssize_t>(sizeof(fuse_in_header) + sizeof(fuse_getattr_in)):
            header.opcode = FUSE_GETATTR
            _is_statx = True
    elif header.opcode == TMPFILE:
        header.opcode = FUSE_CREATE
    elif header.opcode == FUSE_INIT:
        # An old kernel sends a shorter structure, which ends with the flags.
        if count >= <ssize_t>(sizeof(fuse_in_header) + INIT_BYTES):
            _init_unique = header.unique
            _kernel_flags = (<fuse_init_in *>body).flags
    return count


cdef ssize_t _on_writev(int fd, iovec *parts, int count, void *data) noexcept nogil:
    """writev(2) of one answer. Adds the flag that libfuse does not know to the answer of INIT."""
    global _init_unique, _has_killpriv
    cdef fuse_out_header *header
    if _init_unique and count >= 2 and parts[0].iov_len >= sizeof(fuse_out_header):
        header = <fuse_out_header *>parts[0].iov_base
        if header.unique == _init_unique:
            _init_unique = 0
            if (
                _wants_killpriv
                and header.error == 0
                and _kernel_flags & <uint32_t>FUSE_HANDLE_KILLPRIV_V2
                and parts[1].iov_len >= INIT_BYTES
            ):
                (<fuse_init_out *>parts[1].iov_base).flags |= <uint32_t>FUSE_HANDLE_KILLPRIV_V2
                _has_killpriv = True
    return sys_writev(fd, parts, count)


cdef public fuse_session *fuse_session_new(
    fuse_args *args, const fuse_lowlevel_ops *operations, size_t size, void *data
) noexcept with gil:
    """Hides libfuse's function: completes the table of operations, then calls it."""
    global _next_init, _has_dont_mask, _has_killpriv
    cdef session_new_t real = <session_new_t>dlsym(RTLD_NEXT, "fuse_session_new")
    if real == NULL or not _find_replies():
        return NULL
    if _operations is None:
        return real(args, operations, size, data)
    _has_dont_mask = _has_killpriv = False
    memset(&_table, 0, sizeof(_table))
    memcpy(&_table, operations, min(size, sizeof(_table)))
    _next_init = _table.init
    _table.init = _on_init
    _table.fallocate = _on_fallocate
    _table.lseek = _on_lseek
    _table.copy_file_range = _on_copy_file_range
    return real(args, &_table, sizeof(_table), data)


cdef public int fuse_session_mount(fuse_session *session, const char *mountpoint) noexcept with gil:
    """Hides libfuse's function: calls it, then reads and writes the session through this module."""
    cdef session_mount_t real = <session_mount_t>dlsym(RTLD_NEXT, "fuse_session_mount")
    cdef int status
    if real == NULL:
        return -1
    status = real(session, mountpoint)
    if status == 0 and _operations is not None:
        memset(&_io, 0, sizeof(_io))
        _io.read = _on_read
        _io.writev = _on_writev
        # This fails only without memory. The connection then works as it would without this module.
        fuse_session_custom_io(session, &_io, fuse_session_fd(session))
    return status
