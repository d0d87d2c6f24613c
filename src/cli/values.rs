//! The values of flags: how each is written, and the error when it is written wrong.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use tracing_subscriber::filter::{LevelFilter, Targets};

use crate::node::config::DiskConfig;
use crate::protocol::types::GuestName;

/// Longest name of a network device that Linux takes, in bytes.
const DEVICE_NAME_BYTES_MAX: usize = 15;

/// A size in bytes, written as `512M` or `1G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Size {
    pub(super) bytes: u64,
}

impl Size {
    /// So many MiB.
    pub(super) const fn mib(count: u64) -> Size {
        Size { bytes: count << 20 }
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match text.get(digits.len()..).unwrap_or_default().to_ascii_uppercase().as_str() {
            "" => 0,
            "K" | "KIB" => 10,
            "M" | "MIB" => 20,
            "G" | "GIB" => 30,
            "T" | "TIB" => 40,
            _ => return Err("write a whole number with K, M, G or T (of 1024), such as 512M".to_owned()),
        };
        let number: u64 = digits.parse().map_err(|_| "write a whole number, such as 512M or 1G".to_owned())?;
        let bytes = number.checked_mul(1 << shift).ok_or("that is more than a computer can count".to_owned())?;
        Ok(Size { bytes })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.bytes > 0 && self.bytes.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.bytes >> shift);
            }
        }
        write!(f, "{}", self.bytes)
    }
}

/// An Ethernet address of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mac(pub(super) [u8; 6]);

impl Mac {
    /// The address of a guest that was given none: the same for the same name, and of the locally
    /// administered kind.
    pub(super) fn of_guest(guest: &GuestName) -> Mac {
        // FNV-1a: the addresses must be spread and must never change from one build to the next, no
        // more than that.
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        for byte in guest.as_str().bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        let [a, b, c, d, e, ..] = (hash ^ (hash >> 40)).to_le_bytes();
        Mac([0x02, a, b, c, d, e])
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Mac, String> {
        let shape = || "write six pairs of hexadecimal digits, such as 02:00:00:12:34:56".to_owned();
        let mut parts = text.split(':');
        let mut mac = [0; 6];
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = part.and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or_else(shape)?;
        }
        match mac {
            _ if parts.next().is_some() => Err(shape()),
            [0, 0, 0, 0, 0, 0] => Err("this address means none".to_owned()),
            [first, ..] if first & 1 != 0 => {
                Err("this address names a group; the first pair of one device's address is even, such as 02".to_owned())
            }
            _ => Ok(Mac(mac)),
        }
    }
}

/// An IPv4 address and its network, written as `10.0.0.2/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cidr {
    pub(super) ipv4: Ipv4Addr,
    pub(super) prefix_len: u8,
}

impl Cidr {
    fn mask(self) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(self.prefix_len)).unwrap_or(0)
    }

    /// Whether an address can be that of a host in this network. One of 31 bits has two hosts and
    /// neither a number nor a broadcast of its own (RFC 3021); one of 32 bits is its only host.
    pub(super) fn has_host(self, ipv4: Ipv4Addr) -> bool {
        let (mask, bits) = (self.mask(), ipv4.to_bits());
        let is_inside = bits & mask == self.ipv4.to_bits() & mask;
        let is_reserved = self.prefix_len <= 30 && (bits & !mask == 0 || bits & !mask == !mask);
        is_inside && !is_reserved
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Cidr, String> {
        let shape = || "write ADDRESS/BITS, such as 10.0.0.2/24".to_owned();
        let (ipv4, bits) = text.split_once('/').ok_or_else(shape)?;
        let cidr = Cidr { ipv4: ipv4.parse().map_err(|_| shape())?, prefix_len: bits.parse().map_err(|_| shape())? };
        if !(1..=32).contains(&cidr.prefix_len) {
            return Err("the network's prefix has 1 to 32 bits".to_owned());
        }
        let ipv4 = cidr.ipv4;
        if ipv4.is_unspecified() || ipv4.is_loopback() || ipv4.is_multicast() || ipv4.is_broadcast() {
            return Err(format!("{ipv4} cannot be the address of a guest"));
        }
        if !cidr.has_host(ipv4) {
            return Err(format!("{ipv4} is not a host's address in its network of {} bits", cidr.prefix_len));
        }
        Ok(cidr)
    }
}

/// Dirty load of the demo: pages and times per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirtyLoad {
    pub(super) pages: u32,
    pub(super) per_second: u32,
}

impl FromStr for DirtyLoad {
    type Err = String;

    fn from_str(text: &str) -> Result<DirtyLoad, String> {
        let shape = || "write PAGES,PER-SECOND, such as 1000,100".to_owned();
        let (pages, per_second) = text.split_once(',').ok_or_else(shape)?;
        Ok(DirtyLoad {
            pages: pages.parse().map_err(|_| shape())?,
            per_second: per_second.parse().map_err(|_| shape())?,
        })
    }
}

/// How a disk is written.
const DISK_FORM: &str = "write PATH[,ro|,mode=shared[,fenced]][,format=raw][,serial=TEXT]";

/// One disk: its image, and how the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Disk {
    path: PathBuf,
    is_raw: bool,
    read_only: bool,
    shared: bool,
    fenced: bool,
    serial: [u8; 20],
}

impl Disk {
    pub(super) fn config(&self) -> DiskConfig {
        let Disk { path, is_raw, read_only, shared, fenced, serial } = self.clone();
        DiskConfig { path, is_raw, read_only, shared, fenced, serial }
    }
}

impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Disk, String> {
        let mut parts = text.split(',');
        let path = parts.next().filter(|path| !path.is_empty()).ok_or(DISK_FORM)?;
        let mut disk =
            Disk { path: path.into(), is_raw: false, read_only: false, shared: false, fenced: false, serial: [0; 20] };
        let mut given = Vec::new();
        for part in parts {
            let word = part.split('=').next().unwrap_or(part);
            if given.contains(&word) {
                return Err(format!("`{word}` is given twice: {DISK_FORM}"));
            }
            given.push(word);
            match part.strip_prefix("serial=") {
                Some(serial) if (1..=20).contains(&serial.len()) && serial.bytes().all(|b| b.is_ascii_graphic()) => {
                    disk.serial.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
                }
                Some(_) => return Err("a serial number is 1 to 20 characters without spaces".to_owned()),
                None if part == "format=raw" => disk.is_raw = true,
                None if part.starts_with("format=") => {
                    return Err(format!("`{part}`: a disk is raw; `qemu-img convert -O raw` makes it so"));
                }
                None if part == "ro" => disk.read_only = true,
                None if part == "mode=shared" => disk.shared = true,
                None if part == "fenced" => disk.fenced = true,
                None if part == "mode=replicated" => disk.shared = false,
                None => return Err(format!("`{part}` is not known: {DISK_FORM}")),
            }
        }
        if disk.shared && disk.read_only {
            return Err("a disk the guest can only read needs no mode: give both nodes PATH,ro".to_owned());
        }
        if disk.fenced && !disk.shared {
            return Err("`fenced` is a word about shared storage: write PATH,mode=shared,fenced".to_owned());
        }
        Ok(disk)
    }
}

/// Where the guest's console goes, as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ConsoleFlag {
    Stdout,
    Stdio,
    File(PathBuf),
    /// The default path, beside the control socket, if none is given.
    Socket(Option<PathBuf>),
    None,
}

impl FromStr for ConsoleFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<ConsoleFlag, String> {
        match text.split_once(':').unwrap_or((text, "")) {
            ("stdout", "") => Ok(ConsoleFlag::Stdout),
            ("stdio", "") => Ok(ConsoleFlag::Stdio),
            ("none", "") => Ok(ConsoleFlag::None),
            ("socket", "") => Ok(ConsoleFlag::Socket(None)),
            ("socket", path) => Ok(ConsoleFlag::Socket(Some(path.into()))),
            ("file", path) if !path.is_empty() => Ok(ConsoleFlag::File(path.into())),
            _ => Err("write stdout, stdio, socket, socket:/PATH, file:/PATH or none".to_owned()),
        }
    }
}

/// Reads a guest's name.
pub(super) fn guest_name(text: &str) -> Result<GuestName, String> {
    GuestName::new(text).ok_or_else(|| "a guest's name is 1 to 64 letters, digits, '-', '_' and '.'".to_owned())
}

/// Reads an address to listen on or to connect to.
pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "write IP:PORT, such as 10.0.0.1:7401 or [fd00::1]:7401; names are not looked up".to_owned())
}

/// Reads the name of a network device.
pub(super) fn device_name(text: &str) -> Result<String, String> {
    let fits = (1..=DEVICE_NAME_BYTES_MAX).contains(&text.len());
    let clean = text.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'));
    if !fits || !clean || matches!(text, "." | "..") {
        return Err(
            "a network device's name is 1 to 15 characters without spaces, '/', ':' and '%', such as tap0".to_owned()
        );
    }
    Ok(text.to_owned())
}

/// Checks a log filter, and keeps it as text.
pub(super) fn log_filter(text: &str) -> Result<String, String> {
    // The parser takes a lone word for a module whose every line is wanted: a misspelt level would
    // silence all others.
    let is_level = |part: &str| !part.is_empty() && part.parse::<LevelFilter>().is_ok();
    let levels = text.split(',').all(|part| part.rsplit('=').next().is_some_and(is_level));
    if !levels || text.parse::<Targets>().is_err() {
        return Err("write error, warn, info, debug, trace or off, or MODULE=LEVEL,…".to_owned());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("4096", 4096), ("64K", 65536), ("128M", 128 << 20), ("1g", 1 << 30), ("2GiB", 2 << 30)] {
            assert_eq!(text.parse::<Size>(), Ok(Size { bytes }), "{text}");
        }
        for bad in ["", "M", "-1M", "1.5G", "128MB", "128 M", "99999999999T", "0x10", "1é", "18446744073709551616"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
        assert_eq!(Size::mib(512).to_string(), "512M");
        assert_eq!(Size { bytes: 3 }.to_string(), "3");
        assert_eq!(Size { bytes: 0 }.to_string(), "0");
    }

    #[test]
    fn ethernet_addresses() {
        assert_eq!("02:00:00:12:34:aB".parse(), Ok(Mac([2, 0, 0, 0x12, 0x34, 0xab])));
        for bad in
            ["", "02:00:00:12:34", "02:00:00:12:34:56:78", "2:0:0:12:34:56", "01:00:00:00:00:01", "00:00:00:00:00:00"]
        {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
        assert!("+2:00:00:00:00:01".parse::<Mac>().is_err());
    }

    #[test]
    fn a_guest_keeps_its_ethernet_address() {
        let of = |name| Mac::of_guest(&GuestName::new(name).unwrap());
        assert_eq!(of("web"), of("web"));
        assert_ne!(of("web"), of("wec"));
        let Mac(mac) = of("web");
        assert_eq!(mac[0], 2);
        assert_eq!(mac, [0x02, 0x10, 0xbe, 0x2c, 0x48, 0x19]);
    }

    #[test]
    fn networks() {
        let cidr: Cidr = "10.77.0.2/24".parse().unwrap();
        assert!(cidr.has_host(Ipv4Addr::new(10, 77, 0, 1)));
        for outside in [[10, 77, 1, 1], [10, 77, 0, 0], [10, 77, 0, 255]] {
            assert!(!cidr.has_host(outside.into()));
        }
        for bad in
            ["", "10.0.0.2", "10.0.0.2/", "10.0.0.2/0", "10.0.0.2/33", "10.0.0.0/24", "10.0.0.255/24", "10.0.0.4/30"]
        {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
        for bad in ["127.0.0.1/8", "224.0.0.1/4", "0.0.0.0/1", "10.0.0.999/24", "fd00::1/64", "10.0.0.2/-1"] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_network_of_two_hosts_and_one_of_one() {
        for (text, other, is_host) in
            [("10.0.0.2/31", 3, true), ("10.0.0.3/31", 2, true), ("10.0.0.2/31", 4, false), ("10.0.0.2/32", 1, false)]
        {
            let cidr: Cidr = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert!(cidr.has_host(cidr.ipv4), "{text}");
            assert_eq!(cidr.has_host(Ipv4Addr::new(10, 0, 0, other)), is_host, "{text} and 10.0.0.{other}");
        }
    }

    #[test]
    fn disks() {
        let disk = |text: &str| text.parse::<Disk>().map(|disk| disk.config());
        let plain = DiskConfig {
            path: "/a/b.img".into(),
            is_raw: false,
            read_only: false,
            shared: false,
            fenced: false,
            serial: [0; 20],
        };
        assert_eq!(disk("/a/b.img"), Ok(plain.clone()));
        assert_eq!(disk("/a/b.img,ro"), Ok(DiskConfig { read_only: true, ..plain.clone() }));
        assert_eq!(disk("/a/b.img,format=raw"), Ok(DiskConfig { is_raw: true, ..plain.clone() }));
        assert!(disk("/a/b.img,format=qcow2").is_err_and(|error| error.contains("qemu-img convert")));
        assert_eq!(disk("/a/b.img,mode=replicated"), Ok(plain.clone()));
        assert_eq!(disk("/a/b.img,mode=shared"), Ok(DiskConfig { shared: true, ..plain.clone() }));
        let fenced = DiskConfig { shared: true, fenced: true, ..plain.clone() };
        assert_eq!(disk("/a/b.img,mode=shared,fenced"), Ok(fenced));
        assert!(
            disk("/a/b.img,fenced").is_err()
                && disk("/a/b.img,ro,mode=shared").is_err()
                && disk("/a/b.img,mode=none").is_err()
        );
        let mut serial = [0; 20];
        serial[..3].copy_from_slice(b"abc");
        assert_eq!(disk("/a/b.img,serial=abc"), Ok(DiskConfig { serial, ..plain }));
        for twice in ["a,ro,ro", "a,serial=a,serial=b", "a,mode=shared,mode=replicated", "a,format=raw,format=raw"] {
            assert!(disk(twice).is_err_and(|error| error.contains("twice")), "{twice}");
        }
        for bad in ["", ",ro", "a,rw", "a,serial=", "a,serial=a b", "a,serial=012345678901234567890", "a,", "a,ro=1"] {
            assert!(bad.parse::<Disk>().is_err(), "{bad}");
        }
    }

    #[test]
    fn consoles() {
        assert_eq!("stdio".parse(), Ok(ConsoleFlag::Stdio));
        assert_eq!("socket".parse(), Ok(ConsoleFlag::Socket(None)));
        assert_eq!("socket:/run/a:b".parse(), Ok(ConsoleFlag::Socket(Some("/run/a:b".into()))));
        assert_eq!("file:log".parse(), Ok(ConsoleFlag::File("log".into())));
        for bad in ["", "tty", "file", "file:", "stdio:x", "none:x", "Stdout"] {
            assert!(bad.parse::<ConsoleFlag>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_and_the_rest() {
        for bad in ["", "a b", "a/b", "sixteen-chars-xx", "..", "tap\n", "tapé"] {
            assert!(device_name(bad).is_err(), "{bad}");
        }
        assert!(device_name("mcd-a.1").is_ok());
        assert_eq!("10,20".parse(), Ok(DirtyLoad { pages: 10, per_second: 20 }));
        assert!("10".parse::<DirtyLoad>().is_err());
        assert!(address("localhost:1").is_err() && address("1.2.3.4").is_err() && address("[::1]:1").is_ok());
        assert!(
            log_filter("info").is_ok()
                && log_filter("mcd::node=debug,warn").is_ok()
                && log_filter("loud").is_err()
                && log_filter("a=").is_err()
        );
    }
}
