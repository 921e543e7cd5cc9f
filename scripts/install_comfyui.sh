#!/usr/bin/env bash
# ComfyUI with this pack in it: comfy-cli installs ComfyUI where there is none yet (into FOLDER, Python packages into
# FOLDER/.venv); then this folder is linked into custom_nodes, what it needs is installed, and ComfyUI starts once to try it.
# An installed ComfyUI keeps its torch and its settings. Nothing that lies in custom_nodes is replaced.
# Usage: bash scripts/install_comfyui.sh FOLDER [arguments of `comfy install`, such as --version 0.33.0 --nvidia | --amd | --m-series | --cpu]
#        PYTHON makes the environments (3.10 or newer); COMFYUI_PYTHON is the Python of an installed ComfyUI, if it isn't found.
set -euo pipefail
stop() { echo "install_comfyui: $*" >&2; exit 1; }
[ $# -gt 0 ] && [[ $1 != -* ]] || stop "which folder? bash scripts/install_comfyui.sh ~/ComfyUI"
pack=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
mkdir -p "$(dirname "$1")"
comfyui=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
unset VIRTUAL_ENV CONDA_PREFIX  # comfy-cli would install into whatever is active

install_comfyui() {
    local python=${PYTHON:-python3} tool=$pack/.venv-comfy/bin
    [ -d "$pack/.venv-comfy/Scripts" ] && tool=$pack/.venv-comfy/Scripts
    if [ ! -e "$tool/comfy" ] && [ ! -e "$tool/comfy.exe" ]; then
        "$python" -m venv "$pack/.venv-comfy"
        [ -d "$pack/.venv-comfy/Scripts" ] && tool=$pack/.venv-comfy/Scripts
        "$tool/python" -m pip install -q --disable-pip-version-check "comfy-cli>=1.5"
    fi
    local gpu=--cpu
    case " $* " in
        *" --nvidia "* | *" --amd "* | *" --m-series "* | *" --intel-arc "* | *" --cpu "*) gpu= ;;
        *) if command -v nvidia-smi >/dev/null; then gpu=--nvidia; elif [ "$(uname -sm)" = "Darwin arm64" ]; then gpu=--m-series; fi ;;
    esac
    "$tool/comfy" --no-json --skip-prompt --workspace "$comfyui" install ${gpu:+"$gpu"} "$@"
}

find_python() {
    local path
    for path in "${COMFYUI_PYTHON:-}" "$comfyui"/{.venv,venv}/{bin/python,Scripts/python.exe} "$comfyui/../python_embeded/python.exe"; do
        [ -n "$path" ] && [ -x "$path" ] && { echo "$path"; return; }
    done
    stop "which Python runs the ComfyUI in $comfyui? name it: COMFYUI_PYTHON=/path/to/python bash scripts/install_comfyui.sh $comfyui"
}

link_pack() {
    mkdir -p "$comfyui/custom_nodes"
    for place in "$comfyui/custom_nodes"/*; do
        [ "$(cd "$place" 2>/dev/null && pwd -P)" = "$pack" ] && return
        grep -qs '^name = "comfyui-srpo"' "$place/pyproject.toml" && stop "$place is another copy of this pack: move it away first"
    done
    place=$comfyui/custom_nodes/ComfyUI-SRPO
    [ -e "$place" ] && stop "$place is there already and is not this folder: move it away first"
    ln -s "$pack" "$place"
}

try_start() {
    local log
    log=$(cd "$comfyui" && "$python" main.py --cpu --disable-api-nodes --quick-test-for-ci 2>&1) || { echo "$log" >&2; stop "ComfyUI does not start: see above"; }
    grep -qF "$place" <<< "$log" && ! grep -q -e "SRPO: " -e "(IMPORT FAILED): $place\$" <<< "$log" && return
    echo "$log" >&2
    stop "ComfyUI starts, but not all of SRPO's nodes do: see above"
}

[ -f "$comfyui/main.py" ] || install_comfyui "$@"
[ -f "$comfyui/main.py" ] || stop "there is no ComfyUI in $comfyui"
link_pack
python=$(find_python)
torch=$("$python" -c 'import torch; print(torch.__version__)') || stop "$python can't import torch: finish the installation of ComfyUI first"
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
echo "torch==$torch" > "$pins"  # the build that fits this machine stays
"$python" -m pip install -q --disable-pip-version-check -c "$pins" -r "$pack/requirements.txt"
try_start
echo "SRPO is in $comfyui. Start it: cd $comfyui && $python main.py"
