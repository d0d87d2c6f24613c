//! The report as one page that needs nothing else: no script, no network.

use std::fmt::Write;

use crate::report::{FaultReport, Report};
use crate::trial::Trial;

/// Width of a diagram, in px.
const WIDTH: f64 = 640.0;
/// Names of the stages and their colours.
const STAGES: [(&str, &str); 5] = [
    ("detect", "#8da0cb"),
    ("arbitrate", "#fc8d62"),
    ("apply", "#66c2a5"),
    ("restore", "#e78ac3"),
    ("resume", "#a6d854"),
];
const STYLE: &str = "body{font:14px/1.45 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}\
table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ddd;padding:.25em .6em;text-align:right}\
td:first-child,th:first-child,.l{text-align:left}.bad{color:#b00;font-weight:bold}.good{color:#070;font-weight:bold}\
svg{display:block;margin:.3em 0 1em}h3{margin:1.2em 0 .2em}small{color:#666}";

/// The page.
pub fn page(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail: so here and below.
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>mcd soak</title>\
            <style>{STYLE}</style><h1>mcd soak</h1>"
    );
    head(&mut out, report);
    table(&mut out, report);
    let _ = write!(out, "<h2>Takeovers</h2><p>");
    for (name, colour) in STAGES {
        let _ = write!(out, "<span style=\"background:{colour}\">&nbsp;&nbsp;&nbsp;</span> {name} &nbsp; ");
    }
    let _ = write!(
        out,
        "</p><p><small>Each dot is one trial: the time from the fault to the first packet of the new primary. The bar \
            is the median of each stage, counted from the last sign of life.</small></p>"
    );
    for fault in report.faults.iter().filter(|fault| fault.takeover_ms.count > 0) {
        diagram(&mut out, fault, &report.trials);
    }
    wrongs(&mut out, report);
    out.push_str("</html>\n");
    out
}

fn head(out: &mut String, report: &Report) {
    let (class, verdict) = match (report.ok, report.in_time) {
        (true, true) => ("good", "every row came true, in time"),
        (true, false) => ("bad", "every row came true, but not all in time"),
        (false, _) => ("bad", "NOT OK"),
    };
    let c = &report.client;
    let _ = write!(
        out,
        "<p class=\"{class}\">{} trials in {:.0} s, {} violations: {verdict}</p>\
<p>Arbiter {}, heartbeat timeout {} ms, epochs of at most {} ms, a guest of {} MiB, seed {}.<br>\
Clients: {} requests, {} writes acknowledged, {} lost, {} wrong replies, {} resets, {} silent connections.<br>\
Traffic checker: {} frames checked, {} payload bytes compared with what was sent before, {} unplanned takeovers.</p>",
        report.trials.len(),
        report.took_s,
        report.violations,
        escape(&report.arbiter),
        report.heartbeat_timeout_ms,
        report.interval_ms,
        report.memory_mib,
        report.seed,
        c.requests,
        c.acknowledged_writes,
        c.lost_writes,
        c.wrong_replies,
        c.resets,
        c.silent,
        report.frames,
        report.bytes_compared,
        report.unplanned_takeovers,
    );
}

fn table(out: &mut String, report: &Report) {
    out.push_str(
        "<h2>Faults</h2><table><tr><th>fault<th>trials<th class=l>ran the guest<th>takeover p50 / p99 ms<th>silence \
            p50 / p99 ms<th>limit ms<th>client gap p50 / p99 ms<th>violations",
    );
    for fault in &report.faults {
        let runs: Vec<String> = fault.runs.iter().map(|(who, count)| format!("{} × {count}", escape(who))).collect();
        let pair = |s: &crate::report::Spread| {
            if s.count == 0 { "–".to_owned() } else { format!("{:.1} / {:.1}", s.p50, s.p99) }
        };
        let late = if fault.in_time { "" } else { " class=bad" };
        let bad = if fault.violations == 0 && fault.wrong_trials == 0 { "" } else { " class=bad" };
        let limit = fault.silence_limit_ms.map_or_else(|| "–".to_owned(), |ms| ms.to_string());
        let _ = write!(
            out,
            "<tr><td>{}<br><small>{}</small><td>{}<td class=l>{}<td>{}<td{late}>{}<td>{limit}<td>{}<td{bad}>{}",
            fault.name,
            escape(fault.what),
            fault.silence_ms.count,
            runs.join("<br>"),
            pair(&fault.takeover_ms),
            pair(&fault.silence_ms),
            pair(&fault.client_gap_ms),
            fault.violations,
        );
    }
    out.push_str("</table>");
}

fn diagram(out: &mut String, fault: &FaultReport, trials: &[Trial]) {
    let times: Vec<f64> = trials.iter().filter(|t| t.fault == fault.name).filter_map(|t| t.takeover_ms).collect();
    let s = &fault.stages_ms;
    let stages = [s.detect, s.arbitrate, s.apply, s.restore, s.resume];
    let most = fault.takeover_ms.max.max(stages.iter().sum()).max(1.0) * 1.05;
    let x = |ms: f64| ms / most * WIDTH;
    let _ = write!(
        out,
        "<h3>{} <small>{} × , p50 {:.1}, p99 {:.1}, max {:.1} ms</small></h3><svg width=\"{}\" height=\"64\" \
            role=\"img\" font-size=\"10\">",
        fault.name,
        times.len(),
        fault.takeover_ms.p50,
        fault.takeover_ms.p99,
        fault.takeover_ms.max,
        WIDTH + 60.0
    );
    let mut from = 0.0;
    for (ms, (name, colour)) in stages.iter().zip(STAGES) {
        let (left, width) = (x(from), x(*ms).max(0.5));
        let _ = write!(
            out,
            "<rect x=\"{left:.1}\" y=\"28\" width=\"{width:.1}\" height=\"12\" fill=\"{colour}\">\
                <title>{name} {ms:.1} ms</title></rect>"
        );
        from += ms;
    }
    for (number, ms) in times.iter().enumerate() {
        // A little apart, so that equal times do not hide each other.
        let y = 5 + (number * 7) % 19;
        let _ = write!(
            out,
            "<circle cx=\"{:.1}\" cy=\"{y}\" r=\"2.5\" fill=\"#333\" fill-opacity=\"0.55\">\
                <title>{ms:.1} ms</title></circle>",
            x(*ms)
        );
    }
    let _ = write!(out, "<line x1=\"0\" y1=\"44\" x2=\"{WIDTH}\" y2=\"44\" stroke=\"#888\"/>");
    for tick in 0..=4 {
        let ms = most * f64::from(tick) / 4.0;
        let _ = write!(out, "<text x=\"{:.1}\" y=\"57\" fill=\"#555\">{ms:.0} ms</text>", x(ms));
    }
    out.push_str("</svg>");
}

fn wrongs(out: &mut String, report: &Report) {
    let bad: Vec<&Trial> = report.trials.iter().filter(|trial| !trial.wrongs.is_empty()).collect();
    if bad.is_empty() {
        return;
    }
    out.push_str("<h2 class=bad>What did not come true</h2><ul>");
    for trial in bad {
        let _ = write!(out, "<li><b>{}</b>: {}", trial.fault, escape(&trial.wrongs.join("; ")));
    }
    out.push_str("</ul>");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Frame;
    use crate::report::tests::trial;

    #[test]
    fn the_page_stands_alone() {
        let wrong = Trial { wrongs: vec!["<two> releasers".into()], ..trial(12.0, 14.0) };
        let page = page(&Report::new(Frame::default(), vec![trial(10.0, 11.0), wrong]));
        assert!(page.contains("<svg") && page.contains("&lt;two&gt; releasers"));
        assert!(!page.contains("://") && !page.contains("<script") && !page.contains("src="));
        assert_eq!(page.matches("<circle").count(), 2);
    }
}
