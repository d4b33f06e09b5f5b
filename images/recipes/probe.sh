#!/bin/sh
# Says on the console what this machine refuses, one line a check: KILN-PROBE <name> <ok|fail> <detail>.
# The last check breaks the root on purpose: one bit of one file that nothing else reads.

say() {
    echo "KILN-PROBE $*" >/dev/console
}

# The system is up before anything is broken.
state=$(systemctl is-system-running --wait)
say system "$([ "$state" = running ] && echo ok || echo fail)" "$state"

for path in / /etc /usr/lib/kiln; do
    if message=$( (: >"$path/kiln-probe") 2>&1); then
        say read-only fail "wrote to $path"
    else
        case $message in
            *"Read-only file system"*) say read-only ok "$path refuses writes" ;;
            *) say read-only fail "$path: $message" ;;
        esac
    fi
done

# start length verity version data-device hash-device data-block hash-block blocks first algorithm root-hash salt …
hash=$(dmsetup table 2>/dev/null | awk '{ for (i = 1; i < NF; i++) if ($i == "verity") print $(i + 9) }')
case $hash in
    ????????????????????????????????????????????????????????????????) say root-hash ok "$hash" ;;
    *) say root-hash fail "the device-mapper table names no verity root hash: '$hash'" ;;
esac

data=/usr/share/kiln/probe-data
root=/run/kiln/root
# In two parts: else it would be found in this script, whose blocks are needed to go on.
marker="KILN-PROBE"'-MARKER-7f3a91c2d5e8'
cat "$data" >/dev/null && say data ok "$data is readable" || say data fail "$data is not readable"
offset=$(grep -F -a -b -o -m 1 "$marker" "$root" | head -n 1 | cut -d : -f 1)
if [ -z "$offset" ]; then
    say flip fail "$marker is not in $root"
    exit 0
fi
printf k | dd of="$root" bs=1 seek="$offset" conv=notrunc 2>/dev/null || say flip fail "cannot write to $root"
sync
echo 3 >/proc/sys/vm/drop_caches
if message=$(cat "$data" 2>&1 >/dev/null); then
    say flip fail "$data was read although byte $offset of the root is changed"
else
    case $message in
        *"Input/output error"*) say flip ok "byte $offset changed, reading $data gives EIO" ;;
        *) say flip fail "$message" ;;
    esac
fi
