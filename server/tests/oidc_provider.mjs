// A certified OpenID provider (npm's oidc-provider) on loopback, with two people and the log-in form that it brings for
// development. Arguments: port, redirect URI, algorithm of ID tokens, name of its signing keys, a group of one of the two.
import { generateKeyPairSync } from "node:crypto";
import Provider from "oidc-provider";

const [port, redirect, alg, kid, group] = process.argv.slice(2);
const people = { ann: ["staff", group], eve: ["staff"] };
const made = (type, options, alg) => ({
  ...generateKeyPairSync(type, options).privateKey.export({ format: "jwk" }),
  kid: `${kid}-${alg}`, alg, use: "sig",
});
const provider = new Provider(`http://127.0.0.1:${port}`, {
  clients: [{
    client_id: "kiln", client_secret: "a secret & more", redirect_uris: [redirect],
    response_types: ["code"], grant_types: ["authorization_code"], id_token_signed_response_alg: alg,
  }],
  claims: { openid: ["sub", "groups"] },
  conformIdTokenClaims: false,
  findAccount: (_, id) => ({ accountId: id, claims: () => ({ sub: id, groups: people[id] ?? [] }) }),
  pkce: { required: () => true, methods: ["S256"] },
  jwks: { keys: [made("rsa", { modulusLength: 2048 }, "RS256"), made("ec", { namedCurve: "P-256" }, "ES256")] },
  cookies: { keys: ["only for a test"] },
});
provider.listen(Number(port), "127.0.0.1", () => console.log("ready"));
