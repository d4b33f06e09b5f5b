//! Statements of the director and of operators, signed by keys of the target's own: what a stolen key could say.

/// The first byte says which statement; 0x80 that the bytes are the envelope itself.
pub mod directive {
    use super::super::chosen;
    use jiff::Timestamp;
    use kiln_protocol::{
        Architecture, Assignment, Freshness, ImageName, KeyId, MachineId, Order, Ordered, Receipt, Running,
        check_assignment, check_freshness, check_order,
    };
    use kiln_release::{AgentApi, Signer, Site, hex, sign_envelope};
    use serde_json::{Value, json};
    use std::collections::BTreeMap;
    use std::sync::LazyLock;

    const RAW: usize = 0x80;
    const FLOOR: u64 = 2;
    const SEEN: u64 = 5;

    struct World {
        site: Site,
        director: Signer,
        operator: Signer,
        key: KeyId,
        id: MachineId,
        image: ImageName,
    }

    static WORLD: LazyLock<World> = LazyLock::new(|| {
        let (director, operator) = (Signer::from_seed(&[1; 32]), Signer::from_seed(&[2; 32]));
        let listed = |signer: &Signer| BTreeMap::from([(signer.public().id(), signer.public().to_object())]);
        let site = Site {
            type_: "kiln-site".into(),
            spec_version: "1.0".into(),
            name: "lab".into(),
            directors: listed(&director),
            director_threshold: 1,
            operators: listed(&operator),
            operator_threshold: 1,
            agent_api: AgentApi { ca_pem: String::new(), keys: vec![] },
            floors: BTreeMap::from([("minimal".into(), FLOOR)]),
            network: None,
            dbx: None,
        };
        let id = "00000000-0000-0000-0000-000000000001".parse().expect("an id");
        let (key, image) = ("ab".repeat(32).parse().expect("a key id"), "minimal".parse().expect("a name"));
        World { site, director, operator, key, id, image }
    });

    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).expect("a time of this century")
    }

    fn nonce() -> kiln_protocol::Nonce {
        "cd".repeat(32).parse().expect("a nonce")
    }

    fn assignment(text: &[u8]) {
        let world = &*WORLD;
        let Ok((assignment, sha256)) = world.site.verify_director::<Assignment>(text) else { return };
        assert_eq!(sha256, hex::sha256(text));
        let me = Running {
            key: &world.key,
            arch: Architecture::X86_64,
            image: &world.image,
            highest_sequence: SEEN,
            floor: FLOOR,
        };
        let _ = super::super::stable(&assignment);
        if check_assignment(&assignment, &me).is_ok() {
            assert_eq!((&assignment.machine.key, &assignment.image), (&world.key, &world.image));
            assert!(
                assignment.release >= FLOOR && assignment.sequence >= SEEN && assignment.type_ == "kiln-assignment"
            );
        }
    }

    fn freshness(text: &[u8]) {
        let Ok((fresh, _)) = WORLD.site.verify_director::<Freshness>(text) else { return };
        let assigned = "ef".repeat(32).parse().expect("a hash");
        if check_freshness(&fresh, &nonce(), &assigned).is_ok() {
            assert_eq!((&fresh.nonce, &fresh.assignment_sha256), (&nonce(), &assigned));
        }
    }

    fn order(text: &[u8]) {
        let world = &*WORLD;
        let Ok((order, _)) = world.site.verify_operator::<Order>(text, "kiln-order") else { return };
        let _ = super::super::stable(&order);
        let me = Ordered { key: &world.key, name_only: None, now: now(), mark: None, sequence: 1 };
        if check_order(&order, &me).is_ok() {
            assert!(
                order.expires > now() && order.machines.iter().any(|machine| machine.key.as_ref() == Some(&world.key))
            );
        }
        assert!(world.site.verify_director::<Order>(text).is_err(), "the director signs no orders");
    }

    pub fn run(data: &[u8]) {
        let Some((choice, rest)) = super::super::choice(data) else { return };
        let which = (choice & !RAW) % 4;
        let signer = if which == 2 { &WORLD.operator } else { &WORLD.director };
        let value = serde_json::from_slice::<Value>(rest).ok().filter(|_| choice & RAW == 0);
        let signed = value.and_then(|value| sign_envelope(&value, &[signer]).ok());
        let text = signed.map_or_else(|| rest.to_vec(), String::into_bytes);
        match which {
            0 => assignment(&text),
            1 => freshness(&text),
            2 => order(&text),
            _ => drop(WORLD.site.verify_director::<Receipt>(&text).map(|(receipt, _)| receipt.is_complete())),
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let world = &*WORLD;
        let (id, key, hash) = (world.id.as_str(), world.key.as_str(), "ef".repeat(32));
        let (issued, expires) = ("2027-01-01T00:00:00Z", "2028-01-01T00:00:00Z");
        let assignment = json!({ "_type": "kiln-assignment", "spec_version": "1.0", "machine": { "id": id, "key": key },
            "image": "minimal", "release": 3, "manifest_sha256": hash, "role": "web", "arch": "x86_64", "sequence": 7,
            "rebuild": 1, "settings": { "boot_first": "network", "exec": "report" }, "issued": issued, "expires": expires });
        let freshness = json!({ "_type": "kiln-freshness", "spec_version": "1.0", "nonce": nonce().as_str(),
            "assignment_sha256": hash, "now": issued });
        let machines = json!([{ "id": id, "key": key }]);
        let assign = json!({ "_type": "kiln-order", "spec_version": "1.0", "id": "ab".repeat(16), "machines": machines,
            "action": "assign", "image": "rescue", "release": 1, "class": "rescue", "issued": issued, "expires": expires });
        let wipe = json!({ "_type": "kiln-order", "spec_version": "1.0", "id": "ab".repeat(16), "machines": machines,
            "action": "wipe", "disks": ["S1"], "method": "best", "issued": issued, "expires": expires });
        let raw = sign_envelope(&assignment, &[&world.director]).expect("no float");
        let texts = [(0_u8, assignment), (1, freshness), (2, assign), (2, wipe)];
        let mut seeds: Vec<Vec<u8>> =
            texts.iter().flat_map(|(n, value)| chosen(*n, [value.to_string().as_bytes()])).collect();
        seeds.extend(chosen(0x80, [raw.as_bytes()]));
        seeds
    }
}
