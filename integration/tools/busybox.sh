#!/usr/bin/env bash
# Builds a full static busybox from Debian's source package: busybox.sh OUT. About a minute.
#
# Upstream's default configuration and nothing less: with pgrep and ipcs, and with a shell that execs its applets, so that
# a test can see them as processes of their own. tc is left out: it does not compile with the headers of newer kernels.
set -euo pipefail
out=$(realpath -m "$1")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
chmod 755 "$dir"
need=()
for p in dpkg-dev gcc libc6-dev make bzip2; do dpkg -s "$p" > /dev/null 2>&1 || need+=("$p"); done
if [ ${#need[@]} -gt 0 ]; then
  echo "installing ${need[*]}: to build busybox"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${need[@]}"
fi

# Source indexes are read into a directory of this script: the machine's own apt configuration stays as it is.
mkdir -p "$dir/parts" "$dir/lists/partial" "$dir/src"
for f in /etc/apt/sources.list.d/*.sources; do
  [ -f "$f" ] && sed 's/^Types: .*$/Types: deb-src/' "$f" > "$dir/parts/${f##*/}"
done
for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
  [ -f "$f" ] && sed -n 's/^deb /deb-src /p' "$f" > "$dir/parts/$(basename "$f" .list).list"
done
opts=(-o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$dir/parts" -o "Dir::State::Lists=$dir/lists" -o APT::Sandbox::User=root)
apt-get "${opts[@]}" update -qq
cd "$dir/src"
apt-get "${opts[@]}" source -qq busybox
cd busybox-*/
make defconfig
# Upstream's shell hands on variables whose names are none for shells; Debian's does so with an option of its own. Kubernetes gives such
# variables to containers, and its tests print them by `sh -c env`.
sed -i 's/# CONFIG_STATIC is not set/CONFIG_STATIC=y/; s/CONFIG_TC=y/# CONFIG_TC is not set/
  s/# CONFIG_FEATURE_DI_ENV_HACK is not set/CONFIG_FEATURE_DI_ENV_HACK=y/' .config
make -j"$(nproc)" busybox
install -m 755 busybox "$out"
