#!/bin/sh
# Puts soft prompts into KoboldAI. Copy this file into KoboldAI's folder and start it there.
# It uses KoboldAI's own Python, and nothing else on this computer.
cd "$(dirname "$0")" || exit 2
PYTHONNOUSERSITE=1
PYTHONDONTWRITEBYTECODE=1
export PYTHONNOUSERSITE PYTHONDONTWRITEBYTECODE
unset PYTHONPATH PYTHONHOME

finish() {
    if [ -t 0 ]; then
        printf 'Press Enter to close this window. '
        read -r _
    fi
    exit "$1"
}

host_python=
for place in runtime/envs/koboldai runtime/envs/koboldai-rocm runtime/envs/koboldai-ipex venv .venv; do
    if [ -x "$place/bin/python" ]; then
        host_python=$PWD/$place/bin/python
        break
    fi
done
if [ ! -f aiserver.py ] || [ -z "$host_python" ]; then
    echo "This is not the folder of a KoboldAI that has been started once: $PWD"
    echo "Copy install.sh into the folder with aiserver.py and play.sh, start play.sh once, then start install.sh again."
    finish 2
fi
echo "KoboldAI's Python: $host_python"

task=install
if [ -f kobold_sp_plugin.json ] && [ -t 0 ]; then
    printf 'Soft prompts are installed here. Type U and Enter to remove them, or only Enter to repair or upgrade them: '
    read -r answer
    case $answer in [Uu]*) task=uninstall ;; esac
fi

wheel=
for each in ./kobold_sp_plugin-*.whl; do
    [ -f "$each" ] && wheel=$PWD/${each#./}
done
if [ -z "$wheel" ]; then
    echo "There is no kobold_sp_plugin-....whl here. Put it beside install.sh, then start it again."
    finish 2
fi
echo "Package: $wheel"

"$host_python" -c 'import sys; sys.path.insert(0, sys.argv.pop(1)); from kobold_sp_plugin.cli import main; main(prog_name="kobold-sp")' \
    "$wheel" "$task" .
status=$?
[ "$status" -eq 0 ] || echo "That did not work; the lines above say why. KoboldAI starts as before."
finish "$status"
