"""Set-id bits and file capabilities: which of them a change of a file takes away, as ext4 does it.

The kernel checks permissions; this is what it leaves to a file system. With FUSE_HANDLE_KILLPRIV_V2,
which only our module can ask for (fuse.py), all of it is ours, and in return the kernel does not ask
for `security.capability` before every write.
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
    """Which set-id bits a setattr takes away, and whether file capabilities go; as ext4 does it.

    Before an unprivileged write the kernel asks for the new mode; where it was told
    FUSE_HANDLE_KILLPRIV_V2 it asks for a change of nothing (Linux 6.18). That is also how
    chown(-1, -1) comes. What it does not see to in either case is S_ISGID of a group that the
    caller is not in.
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
        # A chmod may give g+xs to a group that the caller is in, and the kernel has looked.
        bits = group_bit(inode, mode & ~stat.S_IXGRP, ctx)
    elif not is_root:
        bits = stat.S_ISUID | group_bit(inode, mode, ctx)
    return bits, bool(gives_away or fields.update_size)


def group_bit(inode: Inode, mode: int, ctx: pyfuse3.RequestContext) -> int:
    """S_ISGID if it has to go: it lets a group execute, or the caller is not of that group."""
    if not mode & stat.S_ISGID:
        return 0
    if mode & stat.S_IXGRP:
        return stat.S_ISGID
    return 0 if is_member(ctx, inode.gid) else stat.S_ISGID


def is_member(ctx: pyfuse3.RequestContext, gid: int) -> bool:
    """Whether a caller may leave a set-group-id bit of that group; root may leave any.

    The kernel knows, but has no way to tell us.
    """
    if not ctx.uid or ctx.gid == gid:
        return True
    try:
        return gid in pyfuse3.get_sup_groups(ctx.pid)
    except (OSError, RuntimeError):  # gone, or in another pid namespace
        return False
