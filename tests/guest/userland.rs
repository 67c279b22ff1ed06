//! All of Debian, from its image to its login prompt and back.

use serde_json::json;

use crate::support::agent::Agent;
use crate::support::artifacts::{guest, sparse_copy};
use crate::support::ballast::Launch;
use crate::vm::{config, set_vcpus};

#[test]
fn debian_boots_to_its_login_prompt_takes_a_disk_and_powers_off() {
    let mut ballast = Launch::new().start();
    sparse_copy(&guest("debian.raw"), &ballast.path("debian.raw"));
    let mut config = config(ballast.dir());
    set_vcpus(&mut config, 2);
    config["memory"]["size"] = json!(512 << 20);
    config["disks"] = json!([{"path": ballast.path("debian.raw"), "num_queues": 2}]);
    config["payload"]["cmdline"] = json!("console=ttyS0 root=/dev/vda systemd.show_status=1");
    let mut api = ballast.api();
    api.put_json("vm.create", &config);
    api.put("vm.boot");
    let line = Agent::on_socket(&ballast.path("serial.sock"));
    line.wait_for("login:");
    line.type_in("root\r");
    line.wait_for("root@ballast-guest");

    // The shell echoes what is typed, so what is waited for must not stand in it.
    let image = crate::support::artifacts::filled_image(ballast.dir(), "hot", 4 << 20);
    api.put_json("vm.add-disk", &json!({"path": image, "serial": "hot"}));
    line.type_in("udevadm wait /dev/vdb; cmp -n 4194304 /dev/vdb /dev/vdb; echo compared=$?\r");
    line.wait_for("compared=0");
    line.type_in("systemctl is-system-running --wait; systemctl --failed --no-legend | wc -l | sed 's/^/failed=/'\r");
    line.wait_for("failed=0");

    api.put("vm.power-button");
    ballast.wait_for_clean_end();
    let check = std::process::Command::new("e2fsck")
        .args(["-fn"])
        .arg(ballast.path("debian.raw"))
        .output()
        .expect("e2fsck");
    let said = String::from_utf8_lossy(&check.stdout);
    assert!(check.status.success(), "{said}");
}
