//! Times on the command line: durations with a unit, moments in RFC 3339 or as milliseconds since 1970.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const UNITS: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1_000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];
const DAY_MS: i64 = 86_400_000;
/// 9999-12-31T23:59:59.999Z.
const MS_MAX: i64 = 253_402_300_799_999;

/// Reads `500ms`, `5s`, `1m30s`, `1.5h`, `2d`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || "a duration is a number with ms, s, m, h or d: 500ms, 5s, 1m30s, 2h".to_owned();
    let mut rest = text.trim();
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(wrong());
    }
    let mut total = 0u64;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail
            .find(|c: char| !c.is_ascii_alphabetic())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let unit = UNITS.iter().find(|(name, _)| *name == unit);
        let (_, unit_ms) = unit.ok_or_else(wrong)?;
        let ms = number.parse::<f64>().map_err(|_| wrong())? * *unit_ms as f64;
        if ms > MS_MAX as f64 {
            return Err("that is too long".to_owned());
        }
        total += ms.round() as u64;
        rest = tail;
    }
    Ok(Duration::from_millis(total))
}

/// Reads `2026-01-31T12:00:00Z`, the same with fractions or an offset, or milliseconds since 1970.
pub fn parse_moment(text: &str) -> Result<SystemTime, String> {
    let wrong =
        || "a moment is RFC 3339 (2026-01-31T12:00:00Z) or milliseconds since 1970".to_owned();
    let ms = match text.parse::<i64>() {
        Ok(ms) => ms,
        Err(_) => rfc3339(text).ok_or_else(wrong)?,
    };
    if !(0..=MS_MAX).contains(&ms) {
        return Err(wrong());
    }
    Ok(UNIX_EPOCH + Duration::from_millis(ms.unsigned_abs()))
}

fn rfc3339(text: &str) -> Option<i64> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = text.get(from..to)?;
        if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
            return None;
        }
        digits.parse().ok()
    };
    if bytes.len() < 20
        || [bytes[4], bytes[7], bytes[13], bytes[16]] != *b"--::"
        || !matches!(bytes[10], b'T' | b't' | b' ')
    {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !(1..=12).contains(&month)
        || !(1..=days_of(year, month)).contains(&day)
        || hour > 23
        || minute > 59
        || second > 60
    {
        return None;
    }
    let mut rest = text.get(19..)?;
    let mut ms = 0;
    if let Some(tail) = rest.strip_prefix('.') {
        let digits = tail.find(|c: char| !c.is_ascii_digit())?;
        if digits == 0 {
            return None;
        }
        let three: String = tail[..digits].chars().chain("00".chars()).take(3).collect();
        ms = three.parse().ok()?;
        rest = &tail[digits..];
    }
    let offset_minutes = match rest {
        "Z" | "z" => 0,
        _ => {
            let sign = match rest.as_bytes().first()? {
                b'+' => 1,
                b'-' => -1,
                _ => return None,
            };
            let (hours, minutes) = rest[1..].split_once(':')?;
            if hours.len() != 2 || minutes.len() != 2 {
                return None;
            }
            let (hours, minutes): (i64, i64) = (hours.parse().ok()?, minutes.parse().ok()?);
            if !(0..24).contains(&hours) || !(0..60).contains(&minutes) {
                return None;
            }
            sign * (hours * 60 + minutes)
        }
    };
    let minutes = (days_since_1970(year, month, day) * 24 + hour) * 60 + minute - offset_minutes;
    Some((minutes * 60 + second) * 1_000 + ms)
}

fn days_of(year: i64, month: i64) -> i64 {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Years are counted from March, so that the leap day is the last one.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// Milliseconds since 1970 as `2026-01-31T12:00:00.000Z`.
pub fn show_ms(ms: u64) -> String {
    let ms = i64::try_from(ms).unwrap_or(MS_MAX).min(MS_MAX);
    let (days, of_day) = (ms.div_euclid(DAY_MS), ms.rem_euclid(DAY_MS));
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        of_day / 3_600_000,
        of_day / 60_000 % 60,
        of_day / 1_000 % 60,
        of_day % 1_000
    )
}

/// A length of time for people: two digits at least, one unit.
pub fn show_duration(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{ms} ms"),
        10_000..600_000 => format!("{} s", ms / 1_000),
        600_000..36_000_000 => format!("{} min", ms / 60_000),
        36_000_000..864_000_000 => format!("{} h", ms / 3_600_000),
        _ => format!("{} d", ms / 86_400_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        for (text, ms) in [
            ("0", 0),
            ("500ms", 500),
            ("5s", 5_000),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("2d", 172_800_000),
        ] {
            assert_eq!(
                parse_duration(text).unwrap(),
                Duration::from_millis(ms),
                "{text}"
            );
        }
        for wrong in ["", "5", "s", "5 s", "-5s", "5x", "1..2s", "99999999999999d"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn moments_are_read_and_shown() {
        let ms = |text: &str| {
            let since = parse_moment(text).unwrap().duration_since(UNIX_EPOCH);
            since.unwrap().as_millis() as u64
        };
        assert_eq!(ms("1970-01-01T00:00:00Z"), 0);
        assert_eq!(ms("2024-02-29T12:30:15.25Z"), 1_709_209_815_250);
        assert_eq!(ms("2024-02-29T13:30:15.250+01:00"), 1_709_209_815_250);
        assert_eq!(ms("1709209815250"), 1_709_209_815_250);
        assert_eq!(show_ms(1_709_209_815_250), "2024-02-29T12:30:15.250Z");
        assert_eq!(show_ms(0), "1970-01-01T00:00:00.000Z");
        for wrong in [
            "tomorrow",
            "2023-02-29T00:00:00Z",
            "2024-01-01T00:00:00",
            "2024-01-01T24:00:00Z",
            "2024-01-01T00:00:00.Z",
            "-1",
        ] {
            assert!(parse_moment(wrong).is_err(), "{wrong}");
        }
    }
}
