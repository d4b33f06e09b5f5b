#!/bin/sh
# Says on the console what root can load for a kexec: KILN-THIEF <what> <detail>. Told so on the serial line, it goes by kexec
# into the release's own kernel, with the release's own initramfs and one file more.

place=/run/kiln-thief

say() {
    echo "KILN-THIEF $*" >/dev/console
}

# A string of what the agent handed over, by the text before it.
said() {
    sed -n "s/.*$1\([^\"]*\)\".*/\1/p" /run/kiln/handoff.json
}

load() {
    kexec -s -l "$place/kexec_kernel" --initrd="$place/initramfs" --command-line="$(said '"command_line":"')" 2>&1 | tr '\n' ' '
    test "$(cat /sys/kernel/kexec_loaded)" = 1
}

if [ "$1" = late ]; then
    if [ "$(cat /proc/sys/kernel/kexec_load_disabled)" = 1 ]; then
        # One is loaded, and stays: the refusal is in the words.
        say late "refused: $(load)"
    else
        say late "nothing was loaded"
    fi
    exit 0
fi

# What carries the site's signature for a kexec is nobody's secret: who has a UKI can make it. Here the rack serves it.
mkdir -p "$place/more/kiln"
server=$(said '"servers":{"http":\["')
for part in kexec_kernel initramfs; do
    hash=$(said "\"$part\":{\"sha256\":\"")
    busybox wget -q -O "$place/$part" "$server/a/$hash" || say fail "$part does not come from $server"
done
# Open before anybody is told, so that no word is lost.
exec 3</dev/ttyS0
say ready "$(wc -c <"$place/kexec_kernel") and $(wc -c <"$place/initramfs") bytes"

until [ "$word" = steal ]; do
    # Its end is a hang-up of the line.
    read -r word <&3 || { sleep 1; exec 3</dev/ttyS0; }
done
echo "not the site's" >"$place/more/kiln/foreign"
truncate -s %4 "$place/initramfs"
(cd "$place/more" && find kiln | busybox cpio -o -H newc 2>/dev/null) >>"$place/initramfs"
if message=$(load); then
    say goes "the kernel takes it"
    kexec -e
else
    say fail "$message"
fi
