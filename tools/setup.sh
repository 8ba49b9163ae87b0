#!/usr/bin/env bash
# Everything that reducer needs on this machine: system packages (Debian, by apt), .venv, the native build.
# Idempotent, and quick when there is nothing to do. `make setup` calls it. `tools/setup.sh integrations` makes
# .venv-integrations after that: torch, the frameworks of tests/integrations, and the reducer that was built for .venv.
# From the environment:
#   PYTHON           the interpreter for a new .venv (default: python3; 3.11 or newer, as the pinned packages want)
#   TORCH_INDEX_URL  where torch's CPU build is found (default: PyTorch's own index)
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1-}" in
  '')
    venv=.venv requirements=(requirements-dev.txt)
    ;;
  integrations)
    # The interpreter that the native module was built for.
    venv=.venv-integrations requirements=(requirements-integrations.txt requirements-dev.txt) PYTHON=.venv/bin/python
    ;;
  *)
    echo 'usage: tools/setup.sh [integrations]' >&2
    exit 2
    ;;
esac
readonly venv requirements python=$venv/bin/python
readonly torch_index=${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}

say() { printf '== setup: %s\n' "$*"; }
fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

system_packages() {
  local -a wanted missing
  mapfile -t wanted < <(sed 's/#.*//; s/[[:space:]]*$//; /^$/d' tools/debian-packages.txt)
  if ! command -v apt-get >/dev/null; then
    say "no apt-get here: the counterparts of these must be there: ${wanted[*]}"
    return
  fi
  mapfile -t missing < <(comm -23 <(printf '%s\n' "${wanted[@]}" | sort) \
    <(dpkg-query -W -f='${db:Status-Status} ${Package}\n' 2>/dev/null | sed -n 's/^installed //p' | sort))
  [ ${#missing[@]} -gt 0 ] || return 0
  say "system packages: ${missing[*]}"
  local -a as_root=(env DEBIAN_FRONTEND=noninteractive)
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "not root, and no sudo; as root: apt-get install ${missing[*]}"
    as_root=(sudo "${as_root[@]}")
  fi
  "${as_root[@]}" apt-get update -q
  "${as_root[@]}" apt-get install -q -y --no-install-recommends "${missing[@]}"
}

virtual_environment() {
  if "$python" -c '' 2>/dev/null; then return; fi
  local interpreter=${PYTHON:-python3}
  command -v "$interpreter" >/dev/null || fail "no $interpreter; set PYTHON to a Python 3.11 or newer"
  "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$interpreter" --version) is too old; set PYTHON to a Python 3.11 or newer"
  say "$venv of $("$interpreter" --version)"
  "$interpreter" -m venv --clear "$venv"
}

# torch's wheel on the package index brings several GB of CUDA along. Where there is no NVIDIA driver, its CPU build
# is looked for first: where pip looks anyway, then at PyTorch's own index; else it is the big one.
cpu_torch() {
  local torch
  torch=$(sed -n 's/^torch==//p' "${requirements[0]}")
  if [ -e /dev/nvidiactl ] || [ "$(uname -m)" != x86_64 ]; then return; fi
  if "$python" -c "import importlib.metadata as m; assert m.version('torch').split('+')[0] == '$torch'" 2>/dev/null
  then return; fi
  say "torch $torch for CPUs"
  "$python" -m pip install -q --no-deps "torch==$torch+cpu" 2>/dev/null && return
  "$python" -m pip install -q --no-deps --retries 1 --index-url "$torch_index" "torch==$torch+cpu" && return
  say "no CPU build of torch within reach; taking the package index's"
}

python_packages() {
  local stamp=$venv/.requirements.sha256 sum
  sum=$(cat "${requirements[@]}" | sha256sum)
  if [ "$(cat "$stamp" 2>/dev/null)" = "$sum" ]; then return; fi
  cpu_torch
  say "Python packages of ${requirements[0]}"
  "$python" -m pip install -q --disable-pip-version-check -r "${requirements[0]}"
  printf '%s\n' "$sum" >"$stamp"
}

# Folders change when a file is removed from them, so they are looked at too.
newer_than() {
  local stamp=$1
  shift
  [ ! -e "$stamp" ] || [ -n "$(find "$@" -newer "$stamp" -print -quit)" ]
}

native_build() {
  local stamp=$venv/.native.stamp begun=$venv/.native.begun
  if ! newer_than "$stamp" csrc CMakeLists.txt setup.py reducer/__init__.py "$venv/.requirements.sha256" &&
    [ -x reducer/bin/reducer-server ] && compgen -G 'reducer/_core*.so' >/dev/null &&
    compgen -G 'reducer/_torch*.so' >/dev/null && [ -e reducer/libreducer.so ]; then
    return
  fi
  say "native build in build/native (minutes at first, then only what changed)"
  touch "$begun"
  "$python" setup.py -q build_ext --inplace
  mv "$begun" "$stamp"
}

editable_install() {
  local stamp=$venv/.install.stamp
  if ! newer_than "$stamp" setup.py pyproject.toml reducer/__init__.py && [ -x $venv/bin/reducer ]; then return; fi
  say "reducer into $venv, from this folder"
  "$python" -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
  touch "$stamp"
}

# An editable install would configure and compile the native build again, for this other interpreter. What it would
# leave behind is the package's metadata (torch finds the backend by the entry point in it) and this folder on the path.
install_as_built() {
  local site
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  printf '%s\n' "$PWD" >"$site/reducer.pth"
  if ! newer_than "$site/reducer.egg-info/entry_points.txt" setup.py pyproject.toml reducer/__init__.py; then return; fi
  say "reducer into $venv, as built"
  .venv/bin/python setup.py -q egg_info --egg-base "$site"
  touch "$site/reducer.egg-info/entry_points.txt"
}

if [ "$venv" = .venv ]; then
  system_packages
  virtual_environment
  python_packages
  native_build
  editable_install
else
  virtual_environment
  python_packages
  install_as_built
fi
