#!/bin/sh
# Says on the console what starts from a place with an allow-list and what does not, one line a check:
# KILN-EXEC <name> <ok|fail> <detail>. Then the guard is killed, and stopped. Times are of /proc/uptime, in 10 ms.
# From then on nothing happens, and what the agent costs at rest is said: KILN-REST <uptime> <line of /proc/PID/stat>.

say() {
    echo "KILN-EXEC $*" >/dev/console
}

now() {
    read -r up _ </proc/uptime
    echo "${up%.*}${up#*.}0"
}

# Runs it; ok if it ends as expected.
starts() {
    name=$1
    shift
    if message=$("$@" 2>&1); then say "$name" ok "started"; else say "$name" fail "$message"; fi
}

denied() {
    name=$1
    shift
    begun=$(now)
    if message=$("$@" 2>&1); then
        say "$name" fail "it started"
    else
        case $message in
            *"Operation not permitted"*) say "$name" ok "denied within $(($(now) - begun)) ms" ;;
            *) say "$name" fail "$message" ;;
        esac
    fi
}

guard() {
    for process in /proc/[0-9]*; do
        if tr '\0' ' ' <"$process/cmdline" 2>/dev/null | grep -q ' exec-guard /'; then
            echo "${process#/proc/}"
            return
        fi
    done
}

# Waits until another process than the given one is the guard.
replaced() {
    tries=0
    while [ $tries -lt 200 ]; do
        new=$(guard)
        if [ -n "$new" ] && [ "$new" != "$1" ]; then
            return 0
        fi
        tries=$((tries + 1))
        sleep 0.05
    done
    return 1
}

systemctl is-system-running --wait >/dev/null
place=/var/opt
cp /usr/bin/true $place/true
cp /usr/bin/id $place/foreign
printf '#!/bin/sh\nexit 0\n' >$place/script
chmod 755 $place/script
sleep 0.1

starts allowed $place/true
denied foreign $place/foreign
denied script $place/script
starts interpreted sh $place/script
starts loader /lib64/ld-linux-x86-64.so.2 $place/foreign
case $(grep " $place " /proc/mounts) in
    *noexec*) say mount fail "the place is still noexec" ;;
    *) say mount ok "executable, because it is guarded" ;;
esac

# Many starts, guarded and not; both on a tmpfs, the other one without a guard and without noexec.
mkdir /run/free
mount -t tmpfs -o mode=0755,size=1M kiln-free /run/free
cp /usr/bin/true /run/free/true
run() {
    begun=$(now)
    n=0
    while [ $n -lt 100 ]; do
        "$1" || say cost fail "$1 did not start"
        n=$((n + 1))
    done
    echo $(($(now) - begun))
}
run /run/free/true >/dev/null
run $place/true >/dev/null
free="$(run /run/free/true) $(run /run/free/true) $(run /run/free/true)"
guarded="$(run $place/true) $(run $place/true) $(run $place/true)"
say cost ok "100 starts of true take $free ms, guarded $guarded ms"

first=$(guard)
say memory ok "$(grep -h -E 'VmRSS|VmLck|Seccomp:' /proc/"$first"/status | tr -s '\t\n ' ' ')"
kill -KILL "$first"
denied killed $place/foreign
if replaced "$first"; then say replaced ok "$first by $(guard)"; else say replaced fail "no other guard"; fi
starts after-kill $place/true

second=$(guard)
# Long enough to be one that is replaced at once.
sleep 2
kill -STOP "$second"
denied stopped $place/foreign
if replaced "$second"; then say replaced-too ok "$second by $(guard)"; else say replaced-too fail "no other guard"; fi
starts after-stop $place/true

# The service ends hard; systemd keeps the group, so what starts meanwhile waits for the next service.
agent=$(systemctl show --property=MainPID --value kiln-agent.service)
kill -KILL "$agent"
denied service-gone $place/foreign
starts after-service $place/true
say done ok "all was tried"

# By the shell's own words, but for the pause: no process is started to look at processes.
while :; do
    read -r up _ </proc/uptime
    for process in /proc/[0-9]*; do
        # It may have ended since.
        { read -r comm <"$process/comm" && read -r stat <"$process/stat"; } 2>/dev/null || continue
        if [ "$comm" = kiln-agent ]; then
            echo "KILN-REST $up $stat" >/dev/console
        fi
    done
    echo "KILN-REST $up all" >/dev/console
    sleep 15
done
