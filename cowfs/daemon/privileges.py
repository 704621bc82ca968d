"""Which set-id bits and file capabilities a change of a file clears, by the rules of ext4.

The kernel checks permissions, but leaves a part of the clearing to the filesystem. With
FUSE_HANDLE_KILLPRIV_V2, which only the module `_session` can request (fuse.py), it leaves all of
it. In return it does not ask for `security.capability` before every write.
"""

import stat

from cowfs.daemon.fuse import killpriv_is_ours, pyfuse3
from cowfs.files.items import Inode

SET_ID = stat.S_ISUID | stat.S_ISGID


def cleared_by_setattr(
    inode: Inode,
    attr: pyfuse3.EntryAttributes,
    fields: pyfuse3.SetattrFields,
    ctx: pyfuse3.RequestContext,
) -> tuple[int, bool]:
    """What a setattr clears.

    Before an unprivileged write the kernel sends a setattr with the new mode. With
    FUSE_HANDLE_KILLPRIV_V2 it sends one that changes nothing (Linux 6.18), as for chown(-1, -1). In
    neither case does it care for S_ISGID of a group that the caller is not in.

    Returns:
        The set-id bits to clear, and whether to remove the file capabilities.
    """
    is_root = ctx.uid == 0
    is_bare = not (
        fields.update_mode
        or fields.update_uid
        or fields.update_gid
        or fields.update_size
        or fields.update_atime
        or fields.update_mtime
        or fields.update_ctime
    )
    gives_away = fields.update_uid or fields.update_gid
    if stat.S_ISDIR(inode.mode) or not (
        gives_away or fields.update_size or fields.update_mode or is_bare
    ):
        return 0, False
    mode = attr.st_mode if fields.update_mode else inode.mode
    bits = 0
    if gives_away or (is_bare and killpriv_is_ours()):
        bits = stat.S_ISUID | group_bit(inode, mode, ctx)
    elif not is_root and fields.update_mode and not fields.update_size:
        # chmod may set g+xs for a group that the caller is in. The kernel has checked the rest.
        bits = group_bit(inode, mode & ~stat.S_IXGRP, ctx)
    elif not is_root:
        bits = stat.S_ISUID | group_bit(inode, mode, ctx)
    return bits, bool(gives_away or fields.update_size)


def group_bit(inode: Inode, mode: int, ctx: pyfuse3.RequestContext) -> int:
    """S_ISGID if it must be cleared, else 0.

    It must be if the group may execute the file, or if the caller is not in the group.
    """
    if not mode & stat.S_ISGID:
        return 0
    if mode & stat.S_IXGRP:
        return stat.S_ISGID
    return 0 if is_member(ctx, inode.gid) else stat.S_ISGID


def is_member(ctx: pyfuse3.RequestContext, gid: int) -> bool:
    """Whether a caller may keep a set-group-id bit of that group. Root may keep any.

    The kernel knows the caller's groups, but FUSE does not pass them on.
    """
    if not ctx.uid or ctx.gid == gid:
        return True
    try:
        return gid in pyfuse3.get_sup_groups(ctx.pid)
    except (OSError, RuntimeError):  # gone, or in another pid namespace
        return False
