# shellcheck shell=bash
# Makes a checkout ready to run, on a fresh Debian 12 or where some or all of it is installed.
#
# Sourced by the other scripts, which then call `setup_checkout run` or `setup_checkout test`.
# Promises:
# - Afterwards $COWFS_ROOT is the checkout, and the commands of its .venv come first in PATH.
# - A second call changes nothing, and needs neither network nor root.
# - If something cannot be installed, the script prints its name and the exact command that installs
#   it, and exits with status 1.

COWFS_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

setup_say() { printf '%s\n' "setup: $*" >&2; }

setup_fail() {
    setup_say "$@"
    exit 1
}

# ---------------------------------------------------------------- what is on the machine

# Prints the first Python in PATH that is new enough.
find_python() {
    local name
    for name in python3 python3.11 python3.12 python3.13 python3.14; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return 0
        fi
    done
    return 1
}

# True if a program with Python.h compiles: that needs gcc, and the headers of libc and Python.
# Each Python has its own headers, and tells where they are.
python_headers_compile() {
    local python="$1" include
    include="$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')" || return 1
    printf '#include <Python.h>\n' | gcc -fsyntax-only -I "$include" -x c - 2>/dev/null
}

# Prints the missing Debian packages, one per line. $1: run or test. $2: the Python, or nothing.
missing_packages() {
    local purpose="$1" python="$2" command_name package

    if [ -z "$python" ]; then
        printf '%s\n' python3 python3-venv python3-dev
    else
        "$python" -c 'import ensurepip, venv' 2>/dev/null || debian_python_package "$python" venv
        if ! python_headers_compile "$python"; then
            # Without gcc nothing compiles: the headers may exist, and are named all the same.
            printf '%s\n' libc6-dev
            debian_python_package "$python" dev
        fi
    fi
    command -v gcc >/dev/null || printf '%s\n' gcc libc6-dev

    command -v pkg-config >/dev/null || printf '%s\n' pkg-config
    pkg-config --exists fuse3 2>/dev/null || printf '%s\n' libfuse3-dev

    while read -r command_name package; do
        command -v "$command_name" >/dev/null || printf '%s\n' "$package"
    done < <(needed_commands "$purpose")
    if [ "$purpose" = test ] && [ ! -f /usr/share/bash-completion/bash_completion ]; then
        printf '%s\n' bash-completion
    fi
    # Debian installs the programs of the PostgreSQL server outside PATH.
    if [ "$purpose" = test ] && ! compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null \
        && ! command -v initdb >/dev/null; then
        printf '%s\n' postgresql
    fi
}

# Prints "command package" for each program that is called, one pair per line.
needed_commands() {
    printf '%s\n' 'fusermount3 fuse3' 'findmnt util-linux' 'tar tar' 'diff diffutils'
    if [ "$1" = test ]; then
        printf '%s\n' 'git git' 'rsync rsync' 'sqlite3 sqlite3' 'setfattr attr' 'setfacl acl' \
            'find findutils' 'du coreutils' 'man man-db' 'zsh zsh' 'fish fish' \
            'systemd-analyze systemd' 'nsenter util-linux' 'fio fio' 'dbench dbench' \
            'stress-ng stress-ng' 'autoconf autoconf' 'automake automake' 'make make' \
            'chromium chromium' 'chromedriver chromium-driver'
    fi
}

# Prints the Debian package with the part $2 (venv or dev) of the Python $1. Prints nothing for a
# Python that is not from Debian: no package can help then, and require_python_parts reports that.
debian_python_package() {
    case "$(readlink -f -- "$1")" in
        /usr/bin/python3.*) printf '%s\n' "$(basename -- "$(readlink -f -- "$1")")-$2" ;;
    esac
}

# ---------------------------------------------------------------- installing

# Runs its arguments as root, or fails without asking for a password.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

# The tests need only the programs of PostgreSQL. This setting keeps Debian's package from creating
# a database and starting a server. An existing settings file is left alone.
refuse_database_cluster() {
    local settings=/etc/postgresql-common/createcluster.conf
    [ ! -e "$settings" ] || return 0
    as_root mkdir -p "$(dirname -- "$settings")"
    printf 'create_main_cluster = false\n' | as_root tee "$settings" >/dev/null
}

install_packages() {
    local line="apt-get install -y --no-install-recommends $*"
    if ! command -v apt-get >/dev/null; then
        setup_fail "these Debian packages, or what your system calls them, are missing: $*"
    fi
    if [ "$(id -u)" -ne 0 ] && ! sudo -n true 2>/dev/null; then
        setup_fail "packages are missing, and only root can install them; run: sudo $line"
    fi
    setup_say "installing $*"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q >&2 \
        || setup_fail "apt-get update failed; once it works, run: $line"
    if [[ " $* " = *' postgresql '* ]]; then
        refuse_database_cluster \
            || setup_fail 'cannot write /etc/postgresql-common/createcluster.conf; try as root'
    fi
    # shellcheck disable=SC2086  # the line is a list of words
    as_root env DEBIAN_FRONTEND=noninteractive $line >&2 || setup_fail "this failed: $line"
}

# Ends the script if the Python still lacks a part that no package can add.
require_python_parts() {
    local python="$1"
    "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || setup_fail "$python has no venv and ensurepip modules: put another Python >= 3.11 first in PATH"
    python_headers_compile "$python" \
        || setup_fail "the headers of $python are missing (Python.h): install them, or put another" \
            "Python >= 3.11 first in PATH"
}

# ---------------------------------------------------------------- the virtual environment

# Prints a checksum of what .venv is made from: pyproject.toml, compiled sources, checkout path.
setup_fingerprint() {
    { cat -- "$COWFS_ROOT/pyproject.toml" "$COWFS_ROOT"/cowfs/daemon/*.pyx; printf '%s\n' "$COWFS_ROOT"; } \
        | sha256sum | cut -d' ' -f1
}

# True if .venv matches the present fingerprint and has what $1 (run or test) needs.
environment_is_ready() {
    local stamp="$COWFS_ROOT/.venv/cowfs-setup-stamp" fingerprint
    fingerprint="$(setup_fingerprint)"
    [ -f "$stamp" ] && "$COWFS_ROOT/.venv/bin/python" -c '' 2>/dev/null || return 1
    case "$1 $(cat -- "$stamp")" in
        "run $fingerprint run" | "run $fingerprint test" | "test $fingerprint test") return 0 ;;
        *) return 1 ;;
    esac
}

make_environment() {
    local purpose="$1" python="$2" venv="$COWFS_ROOT/.venv" requirement="$COWFS_ROOT"
    [ "$purpose" = test ] && requirement="${COWFS_ROOT}[dev]"

    # An environment that was moved, or whose Python is gone, must be made from scratch.
    if ! "$venv/bin/python" -c "import sys; sys.exit(sys.prefix != '$venv')" 2>/dev/null \
        || ! "$venv/bin/pip" --version >/dev/null 2>&1; then
        setup_say "making .venv with $("$python" --version)"
        "$python" -m venv --clear "$venv" || setup_fail "could not make $venv"
    fi
    rm -f -- "$venv/cowfs-setup-stamp"
    setup_say "installing the package and its requirements into .venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$requirement" >&2 \
        || setup_fail "pip could not install $requirement (see above)"
    printf '%s\n' "$(setup_fingerprint) $purpose" >"$venv/cowfs-setup-stamp"
}

# Sets up for $1, `run` or `test`, or ends the script with status 1 and a reason.
setup_checkout() {
    local purpose="$1" python packages lock
    python="$(find_python || true)"
    packages="$(missing_packages "$purpose" "$python" | sort -u | tr '\n' ' ')"
    if [ -n "$packages" ]; then
        # shellcheck disable=SC2086  # a list of words
        install_packages $packages
        hash -r
        python="$(find_python)" || setup_fail "no Python >= 3.11 found, even after installing python3"
    fi
    require_python_parts "$python"

    if ! environment_is_ready "$purpose"; then
        # If two scripts run at once, the second waits here, then finds the work done. The lock is
        # released before returning, so that no program started later inherits it.
        exec {lock}>"$COWFS_ROOT/.venv.lock"
        flock "$lock"
        environment_is_ready "$purpose" || make_environment "$purpose" "$python"
        exec {lock}>&-
    fi
    PATH="$COWFS_ROOT/.venv/bin:$PATH"
    export PATH
}
