//! A disk for tests.

use super::*;

impl MachineDisk {
    /// A new file as the disk of a machine on which this release is on trial. Its slot is empty.
    pub fn on_trial(path: &Path, manifest: &Manifest, uki: &Path) -> Self {
        let settings = DiskSettings { esp: 64 << 20, slot: 16 << 20, state: 36 << 20, ..DiskSettings::default() };
        let size = 140 << 20;
        File::create_new(path).unwrap().set_len(size).unwrap();
        let layout = Layout::new(size, &settings, "lab").unwrap();
        let mut store = Store::open(Device::open(path).unwrap(), layout, true, "sda").unwrap();
        let slots = Slots::new(store.read().unwrap(), Vec::new());
        let mut disk = Self { store, slots, starts: None, beside: None };
        let assign = Event::Assign(content(manifest).unwrap(), 4, Go::Here(Via::Cold));
        for event in [assign, Event::Fetched, Event::Granted] {
            disk.event(event, Some(uki)).unwrap();
        }
        disk
    }

    /// The same at its next opening, its EFI system partition without a boot sector.
    pub fn without_esp(self) -> Self {
        let layout = self.store.layout.clone();
        for copy in [0, 6] {
            let at = layout.esp().start + copy * 512;
            self.store.disk().file().write_all_at(&[0xa5; 512], at).unwrap();
        }
        self.reopened(true)
    }

    /// The same at its next opening; without `writes` it takes none.
    pub fn reopened(self, writes: bool) -> Self {
        let (path, layout) = (self.store.disk().path().to_owned(), self.store.layout.clone());
        drop(self.store);
        let device = if writes { Device::open(&path) } else { Device::open_for_reading(&path) };
        let mut store = Store::open(device.unwrap(), layout, false, "sda").unwrap();
        let slots = Slots::new(store.read().unwrap(), Vec::new());
        Self { store, slots, starts: None, beside: self.beside }
    }
}
