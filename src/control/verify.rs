//! The report on a verify of a guest's disks: the answer to `mc-query-disk-verify`, for
//! both sides of the socket.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a verify is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerifyState {
    /// It goes on.
    Running,
    /// Every block was compared, and no two differ.
    Equal,
    /// Every block was compared, and some differ.
    Different,
    /// It could not be finished.
    Failed,
}

/// What was found of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskVerify {
    /// The disk's number, in the order of `--disk`.
    pub disk: u64,
    /// Its blocks.
    pub blocks: u64,
    /// How many of them were compared.
    pub compared: u64,
    /// How many of those differ.
    pub different: u64,
    /// The first ranges of blocks that differ: the first block of each, and the one after its last.
    pub ranges: Vec<(u64, u64)>,
}

/// The whole answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// How it is.
    pub state: VerifyState,
    /// Why it failed.
    pub why: Option<String>,
    /// Bytes in a block.
    pub block_bytes: u64,
    /// The first and the last committed epoch of which blocks were compared.
    pub epochs: Option<(String, String)>,
    /// The disks.
    pub disks: Vec<DiskVerify>,
}

impl VerifyReport {
    /// Blocks compared, and all blocks.
    pub fn progress(&self) -> (u64, u64) {
        self.disks.iter().fold((0, 0), |(done, all), disk| (done + disk.compared, all + disk.blocks))
    }

    /// The state, with which it ended or goes on.
    fn verdict(&self) -> String {
        match self.state {
            VerifyState::Running => "not finished yet".into(),
            VerifyState::Equal => "equal".into(),
            VerifyState::Different => "DIFFERENT".into(),
            VerifyState::Failed => {
                format!("could not be finished: {}", self.why.as_deref().unwrap_or("nobody knows why"))
            }
        }
    }
}

impl fmt::Display for VerifyReport {
    /// What `mcd disk verify` prints.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for disk in &self.disks {
            let DiskVerify { disk, blocks, compared, different, ranges } = disk;
            write!(f, "disk {disk}: {compared} of {blocks} blocks of {} bytes compared", self.block_bytes)?;
            writeln!(f, ", {different} differ")?;
            let mut listed = 0;
            for (first, end) in ranges {
                listed += end.saturating_sub(*first);
                match end.saturating_sub(*first) {
                    1 => writeln!(f, "  block {first}")?,
                    _ => writeln!(f, "  blocks {first} to {}", end.saturating_sub(1))?,
                }
            }
            match different.saturating_sub(listed) {
                0 => {}
                more => writeln!(f, "  and {more} more")?,
            }
        }
        if let Some((first, last)) = &self.epochs {
            writeln!(f, "compared as of committed epochs {first} to {last}, each block as of one")?;
        }
        writeln!(f, "{}", self.verdict())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_survives_json_and_tells_the_ranges() {
        let disk = DiskVerify { disk: 1, blocks: 300, compared: 256, different: 9, ranges: vec![(5, 6), (10, 14)] };
        let report = VerifyReport {
            state: VerifyState::Different,
            why: None,
            block_bytes: 4096,
            epochs: Some(("g3/17".into(), "g3/20".into())),
            disks: vec![disk],
        };
        let value = serde_json::to_value(&report).unwrap();
        assert_eq!(value["state"], "different");
        assert_eq!(serde_json::from_value::<VerifyReport>(value).unwrap(), report);
        assert_eq!(report.progress(), (256, 300));
        let text = report.to_string();
        let parts = [
            "disk 1: 256 of 300",
            "9 differ",
            "  block 5\n",
            "  blocks 10 to 13\n",
            "  and 4 more\n",
            "g3/17 to g3/20",
            "\nDIFFERENT\n",
        ];
        for part in parts {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }
}
