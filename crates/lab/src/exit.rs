//! Exit codes of the binary, one meaning each.

/// How a verb ended. When several hold, the worst wins: 4 > 3 > 6 > 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Exit {
    /// Done; for `check`: no regression (inconclusive allowed).
    Ok = 0,
    /// Tool or input/output error.
    Tool = 1,
    /// Usage, or an invalid experiment file.
    Usage = 2,
    /// A regression was proven.
    Regressed = 3,
    /// Verification or a quality gate failed.
    VerifyFailed = 4,
    /// Inconclusive, only with `--strict`.
    Inconclusive = 5,
    /// Cells failed, timed out, or are missing. Cells that the plan skipped are not failures.
    Incomplete = 6,
}

impl Exit {
    /// The process exit code.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The worse of two, by 1 = 2 > 4 > 3 > 6 > 5 > 0.
    #[must_use]
    pub fn worst(self, other: Exit) -> Exit {
        let rank = |e: Exit| match e {
            Exit::Ok => 0,
            Exit::Inconclusive => 1,
            Exit::Incomplete => 2,
            Exit::Regressed => 3,
            Exit::VerifyFailed => 4,
            Exit::Tool | Exit::Usage => 5,
        };
        if rank(other) > rank(self) { other } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::Exit;

    #[test]
    fn four_beats_three_beats_six_beats_five() {
        let order =
            [Exit::Ok, Exit::Inconclusive, Exit::Incomplete, Exit::Regressed, Exit::VerifyFailed, Exit::Tool];
        for (i, a) in order.iter().enumerate() {
            for (j, b) in order.iter().enumerate() {
                assert_eq!(a.worst(*b), order[i.max(j)]);
            }
        }
        assert_eq!(order.map(Exit::code), [0, 5, 6, 3, 4, 1]);
    }
}
