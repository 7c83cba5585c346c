#!/usr/bin/env bash
# Headless rendering needs EGL or OSMesa. Installs them where it may, otherwise says in one sentence what to install.
set -u
[ "$(uname -s)" = Linux ] || exit 0
have() { ldconfig -p 2>/dev/null | grep -q "$1"; }
if have libOSMesa.so || { have libEGL.so.1 && have libEGL_mesa.so; } || { have libEGL.so.1 && have libEGL_nvidia.so; }; then
  exit 0
fi
packages="libosmesa6 libegl1 libegl-mesa0 libgl1-mesa-dri"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing the libraries for headless rendering: $packages"
  if apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages >/dev/null; then
    exit 0
  fi
fi
echo "No library for headless rendering was found: install one with 'sudo apt-get install $packages' (or your system's OSMesa or EGL package) and run this again." >&2
exit 1
