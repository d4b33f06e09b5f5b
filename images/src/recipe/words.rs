//! The words of a recipe: names, packages, paths, sizes.

pub(super) fn is_name(text: &str) -> bool {
    text.len() <= 40
        && text.starts_with(|first: char| first.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

pub(super) fn is_class(text: &str) -> bool {
    matches!(text, "normal" | "rescue" | "acceptance" | "wipe")
}

/// Debian Policy §5.6.7.
pub(super) fn is_package(text: &str) -> bool {
    text.len() >= 2
        && text.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c))
}

pub(super) fn is_module(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c))
}

pub(super) fn is_unit(text: &str) -> bool {
    let kinds = [".service", ".socket", ".timer", ".mount", ".automount", ".path", ".target"];
    kinds.iter().any(|kind| text.len() > kind.len() && text.ends_with(kind))
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.@:\\".contains(c))
}

pub(crate) fn is_root_path(text: &str) -> bool {
    let plain =
        |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains(|c: char| c.is_control());
    text.strip_prefix('/').is_some_and(|rest| rest.split('/').all(plain))
}

/// It says whether systemd makes credentials (root's password, units, files) of what firmware, hypervisor and boot stub hand
/// over (systemd(1), `systemd.import_credentials=`): nothing measures them, and left unsaid it does.
pub(super) fn is_command_line(text: &str) -> bool {
    let said = |word| matches!(word, "systemd.import_credentials=no" | "systemd.import_credentials=yes");
    text.split(' ').any(said)
        && text.len() < 2048
        && text.trim() == text
        && text.chars().all(|c| c == ' ' || c.is_ascii_graphic())
}

pub(crate) fn bytes_of(size: &str) -> Option<u64> {
    let (number, unit) = size.split_at_checked(size.len().checked_sub(1)?)?;
    let unit = match unit {
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok().filter(|number| *number > 0)?.checked_mul(unit)
}
