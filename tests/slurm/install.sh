#!/bin/bash
# Installs what tests/slurm runs, where it is missing: as root or by sudo, else says what to install.
set -euo pipefail
packages=(slurmctld slurmd slurm-client munge)
missing=()
for program in slurmctld slurmd sbatch munged; do
  PATH=$PATH:/usr/sbin command -v "$program" >/dev/null || missing+=("$program")
done
if [ ${#missing[@]} = 0 ]; then exit 0; fi
if ! command -v apt-get >/dev/null; then
  echo "make test-slurm needs ${missing[*]}; on Debian and Ubuntu they are in the packages ${packages[*]}" >&2
  exit 1
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
  if ! sudo -n true 2>/dev/null; then
    echo "make test-slurm needs ${missing[*]}: sudo apt-get install --no-install-recommends ${packages[*]}" >&2
    exit 1
  fi
  as_root=(sudo -n)
fi
# The packages' services must not start: exit code 101 of policy-rc.d forbids it.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee $policy >/dev/null
  "${as_root[@]}" chmod +x $policy
  trap '"${as_root[@]}" rm -f $policy' EXIT
fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
