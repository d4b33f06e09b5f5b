//! Recipes that ship are good; wrong ones are refused at the right place.

use kiln_images::error::RecipeError;
use kiln_images::recipe::Recipe;
use std::path::{Path, PathBuf};

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes").join(name)
}

fn load(text: &str) -> Result<Recipe, RecipeError> {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("r.toml");
    std::fs::write(&path, text).unwrap();
    Recipe::load(&path)
}

/// `line:column message` of the refusal.
fn refusal(text: &str) -> String {
    let error = load(text).unwrap_err();
    let RecipeError::Invalid { line, column, message, .. } = error else { panic!("expected a place, got {error}") };
    format!("{line}:{column} {message}")
}

const GOOD: &str = r#"name = "test"
suite = "trixie"
architecture = "x86_64"
kernel = "linux-image-cloud-amd64"
command_line = "console=ttyS0 systemd.import_credentials=no"
packages = ["systemd"]
modules = ["erofs"]
[[health]]
kind = "systemd"
soak = 5
"#;

#[test]
fn shipped_recipes_are_valid() {
    let minimal = Recipe::load(&shipped("minimal.toml")).unwrap();
    assert_eq!((minimal.name.as_str(), minimal.class.as_str()), ("minimal", "normal"));
    let probe = Recipe::load(&shipped("probe.toml")).unwrap();
    assert_eq!((probe.name.as_str(), &probe.modules, &probe.kernel), ("probe", &minimal.modules, &minimal.kernel));
    assert!(probe.files.len() > minimal.files.len());
    assert!(probe.policy.refuse_foreign_command_line && !minimal.policy.refuse_foreign_command_line);
}

#[test]
fn only_recipes_of_class_rescue_have_a_shell_on_a_console() {
    let folder = shipped("minimal.toml").parent().unwrap().to_owned();
    let mut rescues = 0;
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|ext| ext != "toml") {
            continue;
        }
        let recipe = Recipe::load(&path).unwrap();
        let rescue = recipe.class == "rescue";
        rescues += usize::from(rescue);
        // Every unit by which Debian gives a console to somebody is masked, also in a rescue image.
        for unit in [
            "autovt@.service",
            "console-getty.service",
            "container-getty@.service",
            "debug-shell.service",
            "getty@.service",
            "getty.target",
            "getty-static.service",
            "rescue.service",
            "serial-getty@.service",
            "systemd-logind.service",
        ] {
            assert!(recipe.mask.iter().any(|masked| masked == unit), "{}: {unit} may start", path.display());
        }
        let shells = ["getty", "/bin/sh\n", "/bin/bash", "/bin/login", "sulogin", "TTYPath="];
        let has = recipe.files.iter().any(|file| {
            let text = String::from_utf8_lossy(&file.content);
            let unit = file.path.ends_with(".service");
            unit && text.lines().any(|line| shells.iter().any(|shell| format!("{line}\n").contains(shell)))
        });
        assert_eq!(has, rescue, "{}: {}", path.display(), recipe.class);
        assert!(!recipe.command_line.contains("systemd.debug") && !recipe.command_line.contains("init=/bin"));
    }
    assert_eq!(rescues, 1);
}

#[test]
fn unknown_keys_are_refused_with_their_place() {
    let refused = refusal(&GOOD.replace("kernel =", "kernal ="));
    assert!(refused.starts_with("4:1 unknown field `kernal`"), "{refused}");
    let refused = refusal(&format!("{GOOD}retries = 3\n"));
    assert!(refused.starts_with("11:1 unknown field `retries`"), "{refused}");
}

#[test]
fn wrong_values_are_refused_with_their_place() {
    let cases = [
        ("\"test\"", "\"Test\"", "1:8 \"Test\" is not an image name (a-z, 0-9, -; at most 32, a letter first)"),
        (
            "\"test\"",
            "\"a23456789-123456789-123456789-123\"",
            "1:8 \"a23456789-123456789-123456789-123\" is not an image name (a-z, 0-9, -; at most 32, a letter first)",
        ),
        ("\"trixie\"", "\"sid\"", "2:9 \"sid\" is not a suite this builder knows: trixie"),
        ("[\"systemd\"]", "[\"a b\"]", "6:13 \"a b\" is not a Debian package name"),
        ("[\"erofs\"]", "[\"ok\", \"../x\"]", "7:18 \"../x\" is not a kernel module's name"),
        (
            "\"systemd\"\nsoak",
            "\"ping\"\nsoak",
            "9:8 a health check's kind is: systemd, unit, http, tcp, command, memory, disk, time",
        ),
        ("soak = 5", "soak = 5000", "10:8 soak is in seconds, at most 3600"),
        ("console=ttyS0", "a\\nb", "5:16 \"a\\nb systemd.import_credentials=no\" is not one line of printable ASCII"),
        (
            " systemd.import_credentials=no",
            "",
            "5:16 \"console=ttyS0\" is not one line of printable ASCII, exactly what",
        ),
    ];
    for (from, to, expected) in cases {
        let refused = refusal(&GOOD.replacen(from, to, 1));
        assert!(refused.starts_with(expected), "{refused}");
    }
}

#[test]
fn writable_places_and_files_are_checked() {
    let mount = |path: &str, size: &str| format!("{GOOD}[[writable]]\npath = \"{path}\"\nsize = \"{size}\"\n");
    let recipe = load(&mount("/var/log", "2M")).unwrap();
    assert_eq!((recipe.writable[0].path.as_str(), recipe.writable[0].size), ("/var/log", 2 << 20));
    assert!(refusal(&mount("/run/x", "2M")).contains("writable already"));
    assert!(refusal(&mount("/var/../etc", "2M")).contains("without . or .."));
    assert!(refusal(&mount("/var/log", "2")).contains("a size is a number with K, M or G"));
    assert!(refusal(&format!("{GOOD}[[file]]\npath = \"/etc/x\"\n")).contains("either `content` or `source`"));
    assert!(refusal(&format!("{GOOD}[[file]]\npath = \"/etc/x\"\nmode = \"9\"\ncontent = \"\"\n")).contains("octal"));
    let noisy = |size: &str| format!("{GOOD}[[file]]\npath = \"/x\"\ncontent = \"a\"\nnoise = \"{size}\"\n");
    assert_eq!(load(&noisy("1M")).unwrap().files[0].content.len(), 1 + (1 << 20));
    for size in ["2M", "7", "0K", "K"] {
        assert!(refusal(&noisy(size)).contains("up to \"1M\""), "{size}");
    }
}

#[test]
fn health_checks_hooks_limits_and_drift_are_checked_where_they_stand() {
    let all = format!(
        "{GOOD}[[health]]\nkind = \"http\"\nurl = \"http://127.0.0.1:8080/ok\"\n\
         [[health]]\nkind = \"disk\"\npath = \"/var\"\nleast = \"10%\"\nfail_after = 2\n\
         [[hook]]\non = \"drain\"\nname = \"lb\"\nurl = \"http://127.0.0.1/drain\"\non_timeout = \"stay\"\n\
         [[limit]]\nunit = \"web.service\"\nmemory = \"64M\"\ncpu = \"150%\"\n\
         [drift]\nlisten = [\"tcp/443\"]\nmounts = [\"/data\"]\n"
    );
    let declared = load(&all).unwrap().declared;
    let titles: Vec<String> = declared.health.iter().map(kiln_release::HealthCheck::title).collect();
    assert_eq!(titles, ["systemd", "http.http://127.0.0.1:8080/ok", "disk./var"]);
    assert_eq!(declared.health.iter().map(|c| c.fail_after).collect::<Vec<_>>(), [1, 3, 2]);
    assert_eq!(declared.hooks["drain"][0].deadline, 300);
    assert_eq!((declared.limits[0].memory, declared.limits[0].cpu), (Some(64 << 20), Some(150)));
    assert_eq!((declared.listen, declared.mounts), (vec!["tcp/443".to_owned()], vec!["/data".to_owned()]));

    let health = |rest: &str| refusal(&format!("{GOOD}[[health]]\n{rest}\n"));
    for (text, expected) in [
        ("kind = \"http\"", "12:8 kind = \"http\" needs `url`"),
        ("kind = \"http\"\nunit = \"a.service\"", "13:8 `unit` is for kind = \"unit\""),
        ("kind = \"http\"\nurl = \"http://example.com/\"", "13:7 http.http://example.com/: url: http://IP"),
        ("kind = \"memory\"\nleast = \"much\"", "13:9 \"much\" is no threshold"),
        ("kind = \"memory\"", "12:8 memory: say how much must be free"),
        ("kind = \"time\"\nleast = \"5s\"", "13:9 `least` is for kinds memory and disk"),
        ("kind = \"systemd\"", "12:8 systemd: two health checks have the same name"),
        ("kind = \"tcp\"\naddress = \"127.0.0.1:80\"\ndeadline = 61", "13:11 tcp.127.0.0.1:80: deadline is in seconds"),
    ] {
        let refused = health(text);
        assert!(refused.starts_with(expected), "{text}: {refused}");
    }
    let more = |rest: &str| refusal(&format!("{GOOD}{rest}\n"));
    for (text, expected) in [
        ("[[hook]]\non = \"boot\"\nname = \"x\"", "12:6 a hook runs on: drain, undrain"),
        ("[[hook]]\non = \"drain\"\nname = \"x\"", "13:8 a hook has either"),
        ("[[hook]]\non = \"drain\"\nname = \"x\"\nprogram = \"sh\"", "13:8 x: program: the absolute path"),
        ("[[limit]]\nunit = \"a.service\"", "12:8 a limit says"),
        ("[[limit]]\nunit = \"a.timer\"\ncpu = \"5%\"", "12:8 \"a.timer\" is not a systemd service's"),
        ("[[limit]]\nunit = \"a.service\"\ncpu = \"half\"", "13:7 cpu is a share of one processor"),
        ("[drift]\nlisten = [\"443\"]", "12:11 \"443\" is not a port as \"tcp/443\""),
    ] {
        let refused = more(text);
        assert!(refused.starts_with(expected), "{text}: {refused}");
    }
}

#[test]
fn what_must_be_there_is_named() {
    let without = GOOD.replace("command_line = \"console=ttyS0 systemd.import_credentials=no\"\n", "");
    assert!(load(&without).unwrap_err().to_string().contains("command_line is missing"));
    let without = GOOD.split("[[health]]").next().unwrap();
    assert!(load(without).unwrap_err().to_string().contains("[[health]] is missing"));
}

#[test]
fn extending_adds_lists_and_ends_in_rings() {
    let temp = tempfile::tempdir().unwrap();
    std::fs::write(temp.path().join("base.toml"), GOOD).unwrap();
    let top = "extends = \"base.toml\"\nname = \"top\"\nmodules = [\"loop\"]\n";
    std::fs::write(temp.path().join("top.toml"), top).unwrap();
    let recipe = Recipe::load(&temp.path().join("top.toml")).unwrap();
    assert_eq!(recipe.name, "top");
    assert_eq!(recipe.modules, ["erofs", "loop"]);
    assert_eq!(recipe.sources.len(), 2);
    std::fs::write(temp.path().join("ring.toml"), "extends = \"ring.toml\"\n").unwrap();
    let error = Recipe::load(&temp.path().join("ring.toml")).unwrap_err();
    assert!(matches!(error, RecipeError::TooDeep { .. }), "{error}");
}

#[test]
fn the_probes_marker_is_in_its_data_and_nowhere_else() {
    let probe = Recipe::load(&shipped("probe.toml")).unwrap();
    let data = probe.files.iter().find(|file| file.path == "/usr/share/kiln/probe-data").unwrap();
    let (line, noise) = data.content.split_at(data.content.iter().position(|byte| *byte == b'\n').unwrap());
    let marker = std::str::from_utf8(line).unwrap().rsplit(' ').next().unwrap();
    assert_eq!(noise.len(), 1 + (52 << 10));
    let packed = zstd::encode_all(noise, 19).unwrap();
    assert!(packed.len() >= noise.len(), "{} of {} bytes are left: it could be moved", packed.len(), noise.len());
    assert_eq!(Recipe::load(&shipped("probe.toml")).unwrap().files, probe.files, "the same at every build");
    assert!(marker.starts_with("KILN-PROBE-MARKER-"), "{marker}");
    let holds = |content: &[u8]| content.windows(marker.len()).filter(|window| *window == marker.as_bytes()).count();
    for file in &probe.files {
        assert_eq!(holds(&file.content), usize::from(file.path == data.path), "{}", file.path);
    }
}

#[test]
fn secrets_and_data_are_checked() {
    let secret = |more: &str| format!("{GOOD}[[secret]]\nname = \"db\"\n{more}");
    let recipe = load(&secret("units = [\"db.service\"]\n")).unwrap();
    assert!(recipe.declared.secrets[0].required && recipe.declared.secrets[0].owner.is_none());
    for (more, words) in [
        ("[[secret]]\nname = \"db\"\n", "db: two secrets have the same name"),
        ("owner = \"0\"\n", "a secret's owner is a user of the root"),
        ("units = [\"db.mount\"]\n", "at most 16 services"),
        ("value = \"hush\"\n", "unknown field `value`"),
    ] {
        let refused = refusal(&secret(more));
        assert!(refused.contains(words), "{refused}");
    }
    let early = format!("enable = [\"db.service\"]\n{}", secret("units = [\"db.service\"]\n"));
    let error = load(&early).unwrap_err().to_string();
    assert!(error.contains("db.service needs a secret"), "{error}");

    let certificate = |more: &str| format!("{GOOD}[certificate]\n{more}");
    let recipe = load(&certificate("units = [\"web.service\"]\npolicy = \"attested\"\n")).unwrap();
    assert_eq!(recipe.declared.certificate.unwrap().policy, kiln_release::CertificatePolicy::Attested);
    assert_eq!(load(GOOD).unwrap().declared.certificate, None);
    for (more, words) in [
        ("owner = \"0\"\n", "a certificate's owner is a user of the root"),
        ("units = [\"web.mount\"]\n", "at most 16 services"),
        ("policy = \"anybody\"\n", "unknown variant `anybody`"),
        ("key = \"mine\"\n", "unknown field `key`"),
        ("[[secret]]\nname = \"identity.pem\"\n", "no secret is"),
    ] {
        let refused = refusal(&certificate(more));
        assert!(refused.contains(words), "{refused}");
    }
    let early = format!("enable = [\"web.service\"]\n{}", certificate("units = [\"web.service\"]\n"));
    let error = load(&early).unwrap_err().to_string();
    assert!(error.contains("web.service needs a secret or a certificate"), "{error}");

    let disk = |more: &str| format!("mode = \"disk\"\n{GOOD}[disk]\n{more}");
    let recipe = load(&disk("data = \"64M\"\ndata_at = \"/srv\"\n")).unwrap();
    let data = recipe.disk.unwrap().data.unwrap();
    assert_eq!((data.size, data.path.as_str()), (64 << 20, "/srv"));
    assert!(recipe.modules.iter().any(|module| module == "dm_crypt"));
    assert!(recipe.packages.iter().any(|package| package == "e2fsprogs"));
    assert_eq!(recipe.declared.mounts, ["/srv"], "no drift");
    assert!(refusal(&disk("data = \"64M\"\n")).contains("come together"));
    assert!(refusal(&disk("data = \"64K\"\ndata_at = \"/srv\"\n")).contains("at least \"16M\""));
    assert!(refusal(&disk("data = \"64M\"\ndata_at = \"srv\"\n")).contains("not an absolute path"));
}
