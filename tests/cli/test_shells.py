"""Promises of completion in the real shells: commands, options, snapshots and mount options.

Each shell loads the scripts that `cowfs integrate` installs and is asked what the tab key would
offer.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.conftest import require_success
from tests.sizes import HANG_SECONDS


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory with the scripts installed, and an image with snapshots in it."""
    home = tmp_path_factory.mktemp("home")
    require_success(run_command("integrate", "--prefix", home / ".local"))
    require_success(run_command("mkfs", home / "disk.img", "--size", "64M"))
    for name in ("monday", "tuesday"):
        require_success(run_command("snapshot", "create", home / "disk.img", name))
    return home


def run(home: Path, *words: str, text: str | None = None) -> str:
    """The output of a shell that was started with this home only."""
    environment = {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(
        words,
        input=text,
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout


def bash(home: Path, line: str) -> set[str]:
    """The completions of bash; bash-completion loads the script as it does for a user."""
    program = """
    . /usr/share/bash-completion/bash_completion
    __load_completion "$1" || exit 3
    COMP_LINE="$2" COMP_POINT=${#2}
    set -f; COMP_WORDS=($2); set +f
    [[ $2 == *' ' ]] && COMP_WORDS+=('')
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    spec=$(complete -p "$1"); function=${spec#* -F }; function=${function%% *}
    "$function" "$1" "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}" 2>/dev/null
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    return set(run(home, "bash", "-c", program, "bash", line.split()[0], line).splitlines())


def zsh(home: Path, line: str) -> set[str]:
    """The completions of zsh; compinit autoloads the script, which reports what it would add."""
    program = """
    fpath=($HOME/.local/share/zsh/site-functions $fpath)
    autoload -Uz compinit; compinit -u -d $HOME/.zcompdump
    [[ -n ${_comps[$1]} ]] || exit 3
    compadd() {
        local -a names; local each plain=1
        while (( $# )); do case $1 in
            -U|-V) [[ $1 == -V ]] && shift ;;
            -a) plain=0 ;;
            --) ;;
            -*) ;;
            *) if (( plain )); then names+=($1); else names+=(${(P)1}); fi ;;
        esac; shift; done
        print -l -- $names
    }
    _describe() { local -a all; all=(${(P)3}); print -l -- ${all%%:*} }  # -V group ARRAY -U
    _path_files() { print FILES }
    words=(${(z)2}); [[ $2 == *' ' ]] && words+=('')
    CURRENT=$#words
    compstate=()
    ${_comps[$1]}
    """
    return set(run(home, "zsh", "-f", "-c", program, "zsh", line.split()[0], line).splitlines())


def fish(home: Path, line: str) -> set[str]:
    """The completions of fish, asked for as fish's own tests do."""
    text = run(home, "fish", "-c", f"complete --do-complete {shlex.quote(line)}")
    return {each.partition("\t")[0] for each in text.splitlines()}


SHELLS = [bash, zsh, fish]


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: shell.__name__)
def test_the_tab_key_offers_what_would_be_accepted(
    home: Path, shell: Callable[[Path, str], set[str]]
) -> None:
    """Promise: programs complete their commands, options and names; unknown words get nothing."""
    for line, expected in (
        ("cowfs sn", {"snapshot"}),
        ("cowfs snapshot ", {"create", "delete", "hold", "list", "release", "rename"}),
        ("cowfs umount --j", {"--json"}),
        ("cowfs rollback disk.img ", {"monday", "tuesday"}),
        ("cowfs snapshot delete disk.img mon", {"monday"}),
        ("cowfs mount disk.img mnt -o nod", {"nodiscard", "nodev", "nodevices"}),
        ("cowfs mount disk.img mnt -o ro,noat", {"ro,noatime"}),
        ("cowdu disk.img t", {"tuesday"}),
        ("cowdump --gen", {"--generation"}),
    ):
        assert {each.strip() for each in shell(home, line)} == expected, line
    assert "monday" not in shell(home, "cowfs rollback nothing.img m")


@pytest.mark.parametrize("shell", [zsh, fish], ids=lambda shell: shell.__name__)
def test_the_tab_key_offers_snapshots_to_mount(
    home: Path, shell: Callable[[Path, str], set[str]]
) -> None:
    """Promise: -o snapshot= completes the names in the image (bash splits words at the =)."""
    line = "cowfs mount disk.img mnt -o ro,snapshot=m"
    assert {each.strip() for each in shell(home, line)} == {"ro,snapshot=monday"}
