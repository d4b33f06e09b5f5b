#!/bin/sh
# Says on the console, by its hash, which secret it was started with, and how often it was started by what it keeps.

say() {
    echo "KILN-VAULT $*" >/dev/console
}

secret=/run/kiln/secrets/db-password
say secret "$(sha256sum <"$secret" | cut -c 1-16)" "$(stat -c '%a %U' "$secret")" "$(stat -f -c %T "$secret")"

identity=/run/kiln/secrets/identity.pem
say identity "$(stat -c '%a %U' "$identity")" "$(grep -c -e '-----BEGIN' "$identity")"

count=$(($(cat /srv/count 2>/dev/null || echo 0) + 1))
echo "$count" >/srv/count
# In two parts, so that the text itself is in no image; many times, so that it is in many blocks.
marker="KILN-VAULT-KEEPS"'-3f9c1d70'
yes "$marker" | head -n 20000 >/srv/kept
# It is kept as it was written last; the secret lies beside it.
cat "$secret" >/srv/secret
sync
say data "$count" "$(grep -c "$marker" /srv/kept)" "$(sed -n 's|^[^ ]* /srv \([^ ]*\) .*|\1|p' /proc/mounts)"
exec sleep infinity
