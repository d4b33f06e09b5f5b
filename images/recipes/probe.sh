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

# What the firmware's tables say to a system that listens (SMBIOS type 11, as clouds pass user-data): nothing comes of it.
if [ -e /run/kiln-user-data ] || [ -n "$(ls /run/credentials/@system 2>/dev/null)" ]; then
    say user-data fail "the system took in: $(ls /run/credentials/@system /run/kiln-user-data 2>&1 | tr '\n' ' ')"
else
    say user-data ok "no credential came in, nothing was made of one"
fi

# Every place that can be written: a program that is copied there does not run. It runs from the root.
/usr/bin/true && say exec-root ok "/usr/bin/true runs" || say exec-root fail "/usr/bin/true does not run"
# What came of running something: only "Permission denied" is a refusal.
verdict() {
    case $3 in
        *"Permission denied"*) say "$1" ok "$2: Permission denied" ;;
        *) say "$1" fail "$2: $3" ;;
    esac
}
while read -r _ place kind options _; do
    case ,$options, in *,ro,*) continue ;; esac
    case ,$options, in *,nosuid,*) ;; *) say mounts fail "$place ($kind): $options" ;; esac
    case $kind,$options, in devtmpfs,* | devpts,* | *,nodev,*) ;; *) say mounts fail "$place ($kind): $options" ;; esac
    copy=$place/kiln-probe-true
    if cp /usr/bin/true "$copy" 2>/dev/null && chmod 755 "$copy" 2>/dev/null; then
        verdict exec "$place ($kind)" "$("$copy" 2>&1 && echo ran)"
    else
        case ,$options, in
            *,noexec,*) say exec ok "$place ($kind): noexec, and takes no program" ;;
            *) say exec fail "$place ($kind): $options" ;;
        esac
    fi
    rm -f "$copy"
done </proc/mounts
say mounts ok "all that can be written is nosuid and nodev"

# A program in memory that no file system has: made executable on purpose, and as older programs do it.
for flags in 16 0; do
    verdict memfd "flags $flags" "$(python3 -I -S - "$flags" <<'PROGRAM' 2>&1 && echo ran
import os, sys
file = os.memfd_create("probe", int(sys.argv[1]))
os.write(file, open("/usr/bin/true", "rb").read())
os.execve(file, ["true"], {})
PROGRAM
    )"
done

# What a user with all rights can do about noexec, and what only IPE refuses.
copy=/tmp/kiln-probe-true
cp /usr/bin/true "$copy" && chmod 755 "$copy" && mount -o remount,exec /tmp || say remount fail "noexec stays"
case $("$copy" 2>&1 && echo ran) in
    ran) say remount ran "a copied program runs from /tmp after root took noexec away" ;;
    *"Permission denied"*) say remount refused "a copied program does not run although /tmp is no longer noexec" ;;
    *) say remount fail "$copy neither runs nor is refused" ;;
esac
mount -o remount,noexec /tmp
rm -f "$copy"
# Memory that no file backs, made executable as a just-in-time compiler does it: Python's trampolines for perf.
message=$(python3 -I -S -c '
import sys
sys.activate_stack_trampoline("perf")
print(sys.is_stack_trampoline_active())' 2>&1)
case $message in
    True) say jit ran "anonymous memory is made executable" ;;
    *"Permission denied"*) say jit refused "anonymous memory is not made executable" ;;
    *) say jit fail "$message" ;;
esac
# A dm-verity root of no release, where a disk has one: under no signature, under another site's, and, so that it is known to have been
# that, under the site's own. The disk says behind 64 MiB how it is set up. The program in it is in this root as well.
disk=/dev/vda
lab=/run/kiln-foreign
program=/usr/lib/kiln/kiln-agent

says() {
    sed -n "s/^$1 //p" "$lab/says"
}

mounted() {
    device=/dev/dm-$(dmsetup info -c --noheadings -o minor kiln-foreign | tr -d ' ')
    if ! message=$(mount -t erofs -o ro "$device" "$lab/root" 2>&1); then
        echo "mount: $message"
        return
    fi
    if ! cmp "$lab/root/kiln-agent" "$program" 2>&1; then
        echo "it is another program"
    elif message=$("$lab/root/kiln-agent" --version 2>&1); then
        echo "ran: $message"
    else
        echo "exec: $message"
    fi
    umount "$lab/root"
}

# How far it comes under this table, and why no further.
foreign() {
    if message=$(dmsetup --noudevsync --noudevrules --readonly create kiln-foreign --table "$1" 2>&1); then
        mounted
        dmsetup --noudevsync --noudevrules remove kiln-foreign 2>&1
    else
        echo "table: $message"
    fi | tr '\n' ' '
}

if [ -b "$disk" ]; then
    mkdir -p "$lab/root"
    dd if="$disk" bs=1M skip=64 count=1 2>/dev/null | tr -d '\0' >"$lab/says"
    table=$(says table)
    for site in other site; do
        says "$site" | base64 -d >"$lab/$site"
        keyctl padd user "kiln:$site" @s <"$lab/$site" >/dev/null || say verity-key fail "the kernel has no signature of $site"
    done
    found=$(foreign "$table")
    case $found in
        "exec: "*"Permission denied"*) say verity-unsigned ok "$found" ;;
        *) say verity-unsigned fail "$found" ;;
    esac
    found=$(foreign "$table 2 root_hash_sig_key_desc kiln:other")
    case $found in
        "table: "*"Required key not available"* | "table: "*"Key was rejected by service"*) say verity-other ok "$found" ;;
        *) say verity-other fail "$found" ;;
    esac
    found=$(foreign "$table 2 root_hash_sig_key_desc kiln:site")
    case $found in
        "ran: kiln-agent "*) say verity-site ok "$found" ;;
        *) say verity-site fail "$found" ;;
    esac
fi
# Not covered anywhere: a script is data of a signed interpreter.
echo 'exit 7' >/tmp/kiln-probe-script
sh /tmp/kiln-probe-script
[ $? = 7 ] && say script ran "sh runs a script from /tmp" || say script refused "sh refuses a script from /tmp"

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
