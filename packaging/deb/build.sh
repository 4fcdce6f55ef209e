#!/bin/sh
# Builds the Debian package of a wheel: packaging/deb/build.sh WHEEL [FOLDER]
#
# Needs dpkg-deb, Debian's python3, and any Python with pip (PYTHON; python3 by default). pip gets what
# the wheel needs from PyPI. docs/packages.md says why that is not left to Debian's packages.
set -eu
export LC_ALL=C.UTF-8
umask 022

wheel=$(realpath "$1") target=$(realpath "${2:-.}")
source=$(realpath "$(dirname "$0")/../..")
here=$source/packaging/deb
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
home=/usr/lib/ollama-watch
doc=$root/usr/share/doc/ollama-watch

# ---------------------------------------------------------------- the program, in an environment

system=/usr/bin/python3
$system -m venv --without-pip "$root$home"
"${PYTHON:-python3}" -m pip --quiet --python "$root$home/bin/python3" install \
    --no-compile --no-warn-script-location --disable-pip-version-check "$wheel"
version=$($system -c 'import platform; print(platform.python_version())')
printf '%s\n' 'home = /usr/bin' 'include-system-site-packages = true' "version = $version" \
    >"$root$home/pyvenv.cfg"
sed -i "1s|.*|#!$home/bin/python3|" "$root$home/bin/ollama-watch"
find "$root$home/bin" ! -type d ! -name python3 ! -name ollama-watch -delete
ln -sf ../../../bin/python3 "$root$home/bin/python3"
rm -rf "$root$home/include" "$root$home/lib64"
# libcurl and the authorities that it trusts are Debian's, which gives them security updates.
rm -rf "$root$home"/lib/python3*/site-packages/pycurl* "$root$home"/lib/python3*/site-packages/certifi*
rm -rf "$root$home"/lib/python3*/site-packages/curl
find "$root$home/lib" -name '*.py' -exec sed -i '1s|^#!.*||' {} +
# What pip wrote for itself names folders of this build.
find "$root$home/lib" \( -name direct_url.json -o -name RECORD -o -name REQUESTED \) -delete
find "$root$home/lib" -name '*.so*' -exec strip --strip-unneeded {} + 2>/dev/null || true
find "$root$home/lib" -name '*.so*' -exec chmod 644 {} +

# ---------------------------------------------------------------- what belongs to the system

mkdir -p "$root/usr/bin" "$root/usr/share" "$root/etc" "$root/usr/lib/systemd/system" \
    "$doc/examples" "$root/usr/share/zsh/vendor-completions" "$root/DEBIAN"
ln -s "../lib/ollama-watch/bin/ollama-watch" "$root/usr/bin/ollama-watch"
share=$root$home/share
mv "$share/man" "$share/bash-completion" "$share/fish" "$root/usr/share/"
mv "$share/zsh/site-functions/_ollama-watch" "$root/usr/share/zsh/vendor-completions/"
rm -r "$share"
mv "$root/usr/share/bash-completion/completions/ollama-watch.bash" \
    "$root/usr/share/bash-completion/completions/ollama-watch"
gzip -9n "$root"/usr/share/man/man1/*
for unit in "$source"/systemd/*.* "$source"/systemd/*/*.conf; do
    [ -f "$unit" ] || continue
    to=$root/usr/lib/systemd/system
    # It does something at once, so it is only an example.
    case $unit in *.conf) to=$doc/examples ;; esac
    # Without the stamp of `service install`, which didn't write these.
    sed "1d; s|/usr/bin/python3 -I /usr/bin/ollama-watch|$home/bin/python3 -I $home/bin/ollama-watch|" \
        "$unit" >"$to/$(basename "$unit")"
done
install -m 644 "$source/ollama-watch.example.toml" "$root/etc/ollama-watch.toml"
install -m 644 "$here/copyright" "$doc/copyright"
gzip -9n <"$source/CHANGELOG.md" >"$doc/changelog.gz"
mkdir -p "$root/usr/share/lintian/overrides"
install -m 644 "$here/lintian-overrides" "$root/usr/share/lintian/overrides/ollama-watch"

# ---------------------------------------------------------------- what dpkg reads

about() { # FIELD of the wheel's metadata
    sed -n "s/^$1: //p; /^$/q" "$root$home"/lib/python3*/site-packages/ollama_watchd-*.dist-info/METADATA
}
version=$(about Version)-1
maintainer="$(about Maintainer) <$(about Maintainer-email)>"
minor=$($system -c 'import sys; print(sys.version_info.minor)')
# A released version is always packaged at the same time.
epoch=${SOURCE_DATE_EPOCH:-$(stat -c %Y "$source/CHANGELOG.md")}
gzip -9n >"$doc/changelog.Debian.gz" <<END
ollama-watch ($version) unstable; urgency=medium

  * Version $(about Version). The changes are in changelog.gz.

 -- $maintainer  $(date -uRd "@$epoch")
END
sed -e "s|@VERSION@|$version|" -e "s|@MAINTAINER@|$maintainer|" \
    -e "s|@HOMEPAGE@|$(about Project-URL | sed -n 's/^Source, //p')|" \
    -e "s|@ARCHITECTURE@|$(dpkg --print-architecture)|" \
    -e "s|@PYTHON@|python3 (>= 3.$minor), python3 (<< 3.$((minor + 1)))|" \
    -e "s|@SIZE@|$(du -ks --exclude=DEBIAN "$root" | cut -f1)|" \
    "$here/control" >"$root/DEBIAN/control"
install -m 755 "$here/postinst" "$here/prerm" "$here/postrm" "$root/DEBIAN/"
echo /etc/ollama-watch.toml >"$root/DEBIAN/conffiles"
(cd "$root" && find usr -type f -print0 | sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
find "$root" -exec touch --no-dereference --date="@$epoch" {} +

file=$target/ollama-watch_${version}_$(dpkg --print-architecture).deb
SOURCE_DATE_EPOCH=$epoch dpkg-deb --root-owner-group ${DPKG_DEB_OPTIONS:-} --build "$root" "$file" >&2
echo "$file"
