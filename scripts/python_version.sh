#!/usr/bin/env bash
# Says in one sentence that another Python is needed, before pip says it in fifty.
set -u
version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || { echo "There is no Python at '$1': call make with PYTHON=python3.11." >&2; exit 1; }
case "$version" in
  3.11 | 3.12) exit 0 ;;
esac
echo "Python $version is not supported: call make with PYTHON=python3.11 (3.11 and 3.12 work)." >&2
exit 1
