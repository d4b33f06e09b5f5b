//! The list of what is in an image: CycloneDX 1.5, JSON, one component a Debian package, from dpkg's own status file.

use serde_json::{Value, json};

/// (name, version, architecture) of every installed package of /var/lib/dpkg/status.
fn installed(status: &str) -> Vec<(&str, &str, &str)> {
    status.split("\n\n").filter_map(package).collect()
}

fn package(paragraph: &str) -> Option<(&str, &str, &str)> {
    // Continuation lines begin with a space, so a key at a line's start is a field.
    let value = |key: &str| paragraph.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
    (value("Status:")? == "install ok installed").then_some(())?;
    Some((value("Package:")?, value("Version:")?, value("Architecture:")?))
}

/// `linux-image-6.12_6.12.1-1_amd64.deb` → its three parts.
fn of_file_name(name: &str) -> Option<(&str, String, &str)> {
    let mut parts = name.strip_suffix(".deb")?.splitn(3, '_');
    // apt writes an epoch's colon as %3a.
    Some((parts.next()?, parts.next()?.replace("%3a", ":"), parts.next()?))
}

/// The list as bytes, sorted by name.
pub(crate) fn make(image: &str, release: u64, suite: &str, status: &str, extra: &[String]) -> Vec<u8> {
    let component = |(name, version, architecture): (&str, &str, &str)| -> Value {
        json!({
            "type": "library",
            "name": name,
            "version": version,
            "purl": format!("pkg:deb/debian/{name}@{}?arch={architecture}&distro={suite}", version.replace('+', "%2B")),
        })
    };
    let extra: Vec<_> = extra.iter().filter_map(|name| of_file_name(name)).collect();
    let mut all = installed(status);
    all.extend(extra.iter().map(|(name, version, architecture)| (*name, version.as_str(), *architecture)));
    all.sort_unstable();
    crate::base::json(&json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "operating-system", "name": image, "version": release.to_string()}},
        "components": all.into_iter().map(component).collect::<Vec<_>>(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn installed_packages_and_those_taken_apart_are_listed() {
        let status = "Package: bash\nStatus: install ok installed\nArchitecture: amd64\nVersion: 5.2-1+b1\n\n\
                      Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n";
        let bytes = make("minimal", 1, "trixie", status, &["linux-image-6_1%3a6.1-1_amd64.deb".into()]);
        let list: Value = serde_json::from_slice(&bytes).unwrap();
        let purls: Vec<_> =
            list["components"].as_array().unwrap().iter().map(|c| c["purl"].as_str().unwrap()).collect();
        assert_eq!(
            purls,
            [
                "pkg:deb/debian/bash@5.2-1%2Bb1?arch=amd64&distro=trixie",
                "pkg:deb/debian/linux-image-6@1:6.1-1?arch=amd64&distro=trixie"
            ]
        );
    }
}
