//! A small file system of its own in a file, which a test may fill, break and mend. It takes the right to mount: where
//! that is missing, a test says so and is skipped.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// An ext4 in a file. Dropped, it is unmounted.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    place: Option<PathBuf>,
}

impl Disk {
    /// Makes it in a new file; an error says why this machine does not let it be.
    pub fn make(image: PathBuf, bytes: u64) -> Result<Disk, String> {
        let made = fs::File::create(&image).and_then(|file| file.set_len(bytes));
        made.map_err(|error| format!("{}: {error}", image.display()))?;
        run("mkfs.ext4", &["-q", "-F", "-m", "0"], &[&image])?;
        let mut disk = Disk { image, place: None };
        let probe = disk.image.with_extension("probe");
        disk.mount(&probe)?;
        disk.unmount();
        let _ = fs::remove_dir(&probe);
        Ok(disk)
    }

    /// Mounts it; the folder is made if need be. After an error it becomes read-only, as most disks are set up.
    pub fn mount(&mut self, place: &Path) -> Result<(), String> {
        fs::create_dir_all(place).map_err(|error| format!("{}: {error}", place.display()))?;
        let options = ["-o", "loop,errors=remount-ro"];
        run("mount", &options, &[&self.image, place])?;
        self.place = Some(place.to_owned());
        Ok(())
    }

    /// Takes it away. Nobody must use it.
    pub fn unmount(&mut self) {
        let place = self.place.take().expect("it is mounted");
        run("umount", &[], &[&place]).expect("nobody uses it any more");
    }

    /// The kernel finds an error in the file system: from now on nothing is written to it.
    pub fn fail(&self) {
        let place = self.place.as_ref().expect("it is mounted");
        let place = place.canonicalize().expect("it is mounted");
        let mounts = fs::read_to_string("/proc/self/mounts").expect("the kernel tells");
        let mut lines = mounts.lines().map(|line| line.split(' '));
        let device = lines.find_map(|mut fields| {
            let device = fields.next()?;
            (Path::new(fields.next()?) == place).then_some(device)
        });
        let device = device.expect("it is mounted");
        let name = device.rsplit('/').next().unwrap_or(device);
        let trigger = format!("/sys/fs/ext4/{name}/trigger_fs_error");
        fs::write(&trigger, "a test").unwrap_or_else(|error| panic!("{trigger}: {error}"));
    }

    /// The file that it is.
    pub fn image(&self) -> &Path {
        &self.image
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            // A server may still be ending.
            let _ = run("umount", &["-l"], &[&place]);
        }
    }
}

fn run(program: &str, options: &[&str], paths: &[&Path]) -> Result<(), String> {
    let output = Command::new(program).args(options).args(paths).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}
