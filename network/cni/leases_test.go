package cni_test

import (
	"bytes"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/berth-run/berth/network/cni"
)

// harvester#7471: the files of addresses that were taken just before a power cut are there, and empty. Nobody knows whose they
// were: no DEL gave them back, and the range ran out.
func TestHarvester7471_AddressesWithoutAnOwnerAreGivenBack(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/net", 0o755); err != nil {
		t.Fatal(err)
	}
	for file, content := range map[string]string{
		"10.88.0.2": "", "10.88.0.3": "\x00\x00\x00", "10.88.0.4": "other\r\neth0", "10.88.0.5": "", "last_reserved_ip.0": "",
	} {
		if err := os.WriteFile(dir+"/net/"+file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var log bytes.Buffer
	p := cni.New(slog.New(slog.NewTextHandler(&log, nil)))
	conf := `{"cniVersion":"1.0.0","name":"net","type":"x","ipam":{"type":"host-local","dataDir":"` + dir + `","ranges":[[{"subnet":"10.88.0.0/29"}]]}}`
	for _, want := range []string{"10.88.0.2/29", "10.88.0.3/29", "10.88.0.5/29"} {
		out, err := p.Run(t.Context(), "host-local", []byte(conf),
			[]string{"CNI_COMMAND=ADD", "CNI_CONTAINERID=pod" + want[8:9], "CNI_NETNS=/ns", "CNI_IFNAME=eth0", "CNI_PATH=/"}, nil)
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s, %v, want %s", out, err, want)
		}
	}
	if n := strings.Count(log.String(), "is given back"); n != 3 {
		t.Errorf("%d given back: %s", n, log.String())
	}
}
