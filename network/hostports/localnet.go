package hostports

import (
	"errors"
	"fmt"
	"os"
)

// setLocalnet has the kernel let packets from 127.0.0.1 out of a link, or no more: on the node 127.0.0.1 has the host ports,
// too. The table keeps what is on that link from the node's loopback addresses meanwhile. A link that has gone is no error
// where it is not wanted any more.
func setLocalnet(link string, on bool) error {
	setting := "/proc/sys/net/ipv4/conf/" + link + "/route_localnet"
	value := "0"
	if on {
		value = "1"
	}
	err := os.WriteFile(setting, []byte(value), 0o600)
	if err == nil || !on && errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return fmt.Errorf("host ports at 127.0.0.1: %w", err)
}
