//! Files that people write: expected machines, recipes. A mistake in one is told with its place.

/// The list of expected machines, CSV and TOML. The first byte says which.
pub mod expected_list {
    use super::super::super::server::expected::{Format, read};
    use super::super::chosen;
    use kiln_fleet::{ExpectedList, Flaws};

    const NOW: u64 = 1_800_000_000_000;

    fn told(flaws: &Flaws) {
        assert!((1..=20).contains(&flaws.listed.len()), "{} mistakes are listed", flaws.listed.len());
        assert!(flaws.listed.iter().all(|flaw| flaw.at.line > 0 && flaw.at.column > 0));
        let text = flaws.to_string();
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?} goes to a terminal");
    }

    pub fn run(data: &[u8]) {
        let Some((choice, rest)) = super::super::choice(data) else { return };
        let format = if choice % 2 == 0 { Format::Csv } else { Format::Toml };
        let rows = match read(rest, format) {
            Ok(rows) => rows,
            Err(flaws) => return told(&flaws),
        };
        let mut list = ExpectedList::default();
        for replace in [false, true, false] {
            match list.import(&rows, replace, NOW) {
                Ok(change) => {
                    if !list.is_empty() {
                        assert_eq!(change.list, list, "the same file again changes the list");
                    }
                    assert!(change.list.machines().len() <= rows.len());
                    list = change.list;
                }
                Err(flaws) => {
                    assert!(list.is_empty(), "the same file again is refused: {flaws}");
                    return told(&flaws);
                }
            }
        }
        for (key, machine) in list.machines() {
            assert_eq!(list.machine(key), Some(machine));
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let csv = [
            "sku,model,cpus,memory,disks,nics\ndb,EPYC box,2 x EPYC 9754,4 x 32 GiB,2 x 960 GB nvme,2 x 25 Gb/s\nn,,,4 x 32 GiB in A1 A2 B1 B2,,\n",
            "switch;port;rack;unit\r\ns1;Ethernet1/14;A;14\r\ns1;Ethernet1/12;A;U12\r\n",
            "serial,uuid,mac,rack,unit,switch,port,model,expected\nABC1,,,A,U14,,,\"a \"\"b\"\"\",2026-11-20\nABC2,00000000-0000-0000-0000-000000000002,52:54:00:00:00:02,B,3,,,,\n",
            "sep=;\n#note;serial;u\nx;S1;7\n",
        ];
        let toml = [
            "[[sku]]\nsku = \"db\"\nmemory = \"4 x 32 GiB\"\n\n[[machine]]\nserial = \"S1\"\nmac = \"52:54:00:00:00:01\"\nsku = \"db\"\nunit = 14\n",
            "[[port]]\nswitch = \"s1\"\nport = \"1\"\nrack = \"A\"\n[[machine]]\nuuid = \"00000000-0000-0000-0000-000000000003\"\nexpected = 2026-12-24\n",
        ];
        let bytes = |texts: &[&'static str]| texts.iter().map(|text| text.as_bytes()).collect::<Vec<_>>();
        [chosen(0, bytes(&csv)), chosen(1, bytes(&toml))].concat()
    }
}

/// Recipes, read from a file as the builder does. Those that name other files are left out: what they read is not the
/// fuzzer's to choose.
pub mod recipe {
    use kiln_images::recipe::Recipe;
    use std::path::PathBuf;

    thread_local! {
        static FILE: (tempfile::TempDir, PathBuf) = {
            let memory = std::path::Path::new("/dev/shm");
            let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
            let dir = dir.expect("a folder for the recipe");
            let path = dir.path().join("recipe.toml");
            (dir, path)
        };
    }

    pub fn run(data: &[u8]) {
        let text = String::from_utf8_lossy(data);
        if ["extends", "source", "\\"].iter().any(|word| text.contains(word)) {
            return;
        }
        FILE.with(|(_, path)| {
            std::fs::write(path, data).expect("a file in memory");
            match Recipe::load(path) {
                Ok(recipe) => {
                    let again = Recipe::load(path).expect("the same file");
                    assert_eq!(format!("{recipe:?}"), format!("{again:?}"), "the same recipe, read otherwise");
                }
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.contains("recipe.toml"), "{text:?} does not say where");
                    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?} goes to a terminal");
                }
            }
        });
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let plain = |text: &str| {
            let lines = text.lines().filter(|line| !line.contains("extends") && !line.contains("source"));
            lines.fold(String::new(), |all, line| all + line + "\n").into_bytes()
        };
        [
            include_str!("../../../images/recipes/minimal.toml"),
            include_str!("../../../images/recipes/servers.toml"),
            include_str!("../../../images/recipes/exec.toml"),
            include_str!("../../../images/recipes/disk.toml"),
            include_str!("../../../images/recipes/acceptance.toml"),
        ]
        .map(plain)
        .to_vec()
    }
}
