//! What a machine is compared with while it runs: `/usr/lib/kiln/expected.json` in the root. It is read off the very tree
//! that becomes the root, so that nothing has to be kept in step by hand. Programs that checks and hooks name are looked
//! for here, too.

use crate::base::{Base, json};
use crate::declared::drop_in;
use crate::error::BuildError;
use crate::recipe::Recipe;
use crate::tarball::{Added, Content, Entry, Kind};
use kiln_release::declared::EXPECTED_PATH;
use kiln_release::{Expected, HealthKind, HookKind};
use std::collections::BTreeSet;

/// Where systemd looks for units in a root.
const UNIT_FOLDERS: [&str; 3] = ["/usr/lib/systemd/system/", "/etc/systemd/system/", "/usr/local/lib/systemd/system/"];

/// The entries that declarations add to the top layer: drop-ins, and the file itself. `kept` are the packages' entries
/// that stay, `top` what the layer holds so far, `modules` the initramfs's.
pub(crate) fn entries(
    recipe: &Recipe,
    base: &Base,
    tar: &[u8],
    kept: &[&Entry],
    top: &[Added],
    modules: &[String],
) -> Result<Vec<Added>, BuildError> {
    let file = |path: String, content: Vec<u8>| Added { path, mode: 0o644, content: Content::File(content) };
    let services = services(recipe, kept, top);
    check_programs(recipe, kept)?;
    check_units(recipe, &services)?;
    let passwd = recipe.files.iter().find(|file| file.path == "/etc/passwd").map(|file| file.content.as_slice());
    let passwd = passwd.or_else(|| {
        let entry = kept.iter().find(|entry| entry.path == "/etc/passwd")?;
        tar.get(entry.data.clone())
    });
    let users = kiln_release::declared::users_of(&String::from_utf8_lossy(passwd.unwrap_or_default()));
    let owners = recipe.declared.secrets.iter().filter_map(|secret| secret.owner.as_ref());
    let owners = owners.chain(recipe.declared.certificate.iter().filter_map(|certificate| certificate.owner.as_ref()));
    for owner in owners {
        if !users.iter().any(|user| user.rsplit_once(':').is_some_and(|(name, _)| name == owner)) {
            return Err(BuildError::NoSuchUser { recipe: recipe.name.clone(), user: owner.clone() });
        }
    }
    let in_root = kept.iter().filter(|entry| entry.path.starts_with("/usr/lib/modules/")).map(|entry| &entry.path);
    let names = in_root.chain(modules).filter_map(|path| {
        let file = path.rsplit('/').next()?;
        Some(file.split_once(".ko")?.0.replace('-', "_"))
    });
    let expected = Expected {
        kernel: base.info.kernel_release.clone(),
        modules: names.collect::<BTreeSet<_>>().into_iter().collect(),
        services: services.into_iter().collect(),
        users,
        listeners: recipe.declared.listen.clone(),
        mounts: recipe.declared.mounts.clone(),
        limits: recipe.declared.limits.clone(),
    };
    let mut added: Vec<Added> = recipe
        .declared
        .limits
        .iter()
        .map(|limit| {
            let (path, text) = drop_in(limit);
            file(path, text.into_bytes())
        })
        .collect();
    added.push(file(EXPECTED_PATH.into(), json(&expected)));
    Ok(added)
}

fn is_service(unit: &str) -> bool {
    unit.rsplit_once('.').is_some_and(|(_, kind)| kind == "service")
}

fn services(recipe: &Recipe, kept: &[&Entry], top: &[Added]) -> BTreeSet<String> {
    let paths = kept.iter().map(|entry| &entry.path).chain(top.iter().map(|added| &added.path));
    let name = |path: &String| {
        let rest = UNIT_FOLDERS.iter().find_map(|folder| path.strip_prefix(folder))?;
        let name = rest.rsplit('/').next()?;
        (is_service(name) && !recipe.mask.iter().any(|masked| masked == name)).then(|| name.to_owned())
    };
    paths.filter_map(name).collect()
}

fn check_programs(recipe: &Recipe, kept: &[&Entry]) -> Result<(), BuildError> {
    let checks = recipe.declared.health.iter().filter(|check| check.kind == HealthKind::Command);
    let hooks = recipe.declared.hooks.values().flatten().filter(|hook| hook.kind == HookKind::Command);
    let named = checks.map(|check| ("[[health]]", &check.target)).chain(hooks.map(|hook| ("[[hook]]", &hook.target)));
    for (key, path) in named {
        let own = recipe.files.iter().any(|file| file.path == *path && file.mode & 0o111 != 0);
        let packaged = kept.iter().any(|entry| {
            entry.path == *path
                && (matches!(entry.kind, Kind::Symlink(_)) || (entry.kind == Kind::File && entry.mode & 0o111 != 0))
        });
        if !own && !packaged {
            return Err(BuildError::NoDeclaredProgram { recipe: recipe.name.clone(), key, path: path.clone() });
        }
    }
    Ok(())
}

fn check_units(recipe: &Recipe, services: &BTreeSet<String>) -> Result<(), BuildError> {
    let checks = recipe.declared.health.iter().filter(|check| check.kind == HealthKind::Unit);
    let limits = recipe.declared.limits.iter().map(|limit| ("[[limit]]", &limit.unit));
    let needy = recipe.declared.secrets.iter().flat_map(|secret| &secret.units).map(|unit| ("[[secret]]", unit));
    for (key, unit) in checks.map(|check| ("[[health]]", &check.target)).chain(limits).chain(needy) {
        let template = unit.split_once('@').map(|(before, _)| format!("{before}@.service"));
        let there = services.contains(unit) || template.is_some_and(|template| services.contains(&template));
        if is_service(unit) && !there {
            return Err(BuildError::NoSuchUnit { recipe: recipe.name.clone(), key, unit: unit.clone() });
        }
    }
    Ok(())
}
